"""Named data sets as uint8 arrays, the order in which they are seen, and images from files."""
