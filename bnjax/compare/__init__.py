"""Compares several runs and reports on them."""
