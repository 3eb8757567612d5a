"""The live page of a run: one page, served read only from this machine, fed by the run's events."""
