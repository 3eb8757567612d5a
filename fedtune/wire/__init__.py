"""The bytes that travel: tensors as bodies, and the two messages of a round as headers that describe them."""
