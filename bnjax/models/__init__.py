"""The networks; the norm is injected."""
