"""Named data sets, batches of them, and files of images."""
