"""Benchmarks read from local files: their prompts, how answers are scored, and how sure a score is."""
