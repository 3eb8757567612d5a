"""The client wing's model: load a base, attach adapters, train, score, merge. Importing it loads no torch."""
