"""Who is asked to do what: one planner per file, and the interface through which the round loop calls them."""
