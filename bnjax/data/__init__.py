"""Data sets as uint8 arrays, the order of training examples, and images from files."""
