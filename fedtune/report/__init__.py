"""A run directory made into pages, pictures and event files, from its records alone."""
