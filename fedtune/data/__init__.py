"""From files to examples: read the rows, divide them among clients, encode them for the model."""
