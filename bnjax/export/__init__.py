"""Exports trained networks as programs and models that run without bnjax."""
