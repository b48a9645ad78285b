"""A network on a CPU: packed weights and a static program per shape."""
