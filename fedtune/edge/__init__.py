"""What runs on a device without torch: a base as a bundle of files, and forward passes over it."""
