"""Batch normalization in JAX: understood, measured and used correctly."""
