"""A run on a GPU: its sections, the lines that they write, and what a page says of the lines."""
