"""What runs on a client: training on its own examples, and the processes that host it."""
