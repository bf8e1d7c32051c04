"""Loads data sets and image files, and determines the order of training examples."""
