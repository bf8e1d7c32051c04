"""Config keys for a claim that is tried at a small budget.

A tenth of the images in batches of a tenth, so that an epoch is still 10 steps, and a narrow
network: half a million multiplications an image forward instead of 34 million.
"""

SMALL = {
    "data.train_images": 5000,
    "model.filters": (8, 12, 16),
    "model.dense": (64, 32),
    "model.groups": 4,
    "train.batch_size": 500,
    "train.steps": 100,
}
