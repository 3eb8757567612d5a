"""Which heads and channels of a model are kept, and in which order they are pruned."""
