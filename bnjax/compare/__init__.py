"""How many runs are compared."""
