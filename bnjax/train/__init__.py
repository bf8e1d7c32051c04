"""Trains, evaluates and records a run that a config describes."""
