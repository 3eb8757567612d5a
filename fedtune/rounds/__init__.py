"""The round loop: plan, assign, exchange, admit, aggregate, commit."""
