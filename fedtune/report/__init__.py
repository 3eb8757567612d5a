"""Pages, figures and event files of a run, from the JSON in its directory alone."""
