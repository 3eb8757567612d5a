"""One run from recipe to summary: local, served, exported, deployed."""
