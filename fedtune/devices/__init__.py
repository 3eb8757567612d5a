"""What devices can carry and how long they take: profiles, costs, traces, clocks."""
