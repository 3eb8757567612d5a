"""One run from its recipe to summary.json, and what is exported and deployed of it."""
