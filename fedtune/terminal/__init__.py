"""What people see on a terminal or in a notebook: progress, tables, and how numbers and names are written."""
