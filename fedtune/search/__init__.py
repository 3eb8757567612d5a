"""Search for settings: which values trials get, and which trial goes on for how many rounds."""
