"""The keys of the config that say which data there are, how they are read and augmented."""

from bnjax.train.allowed import AMOUNT, FLAG, MAX_SIDE, MAX_WORKERS, TEXT, Check, Key, one_of, whole

PIXELS = whole(0, MAX_SIDE, f"a whole number of pixels up to {MAX_SIDE:,}, or 0")

DATA_KEYS = (
    Key(
        "data.name",
        "cifar10",
        Check("cifar10, cifar100, digits, records, or the name of a TFDS set", bool),
        "cifar10, cifar100, digits, or a data set of TensorFlow Datasets; records: the ones in "
        "data.dir",
    ),
    Key(
        "data.dir",
        "",
        TEXT,
        "a folder with cifar-10-batches-bin or cifar-10-binary.tar.gz or array_record files, or a "
        "TFDS data_dir",
    ),
    Key(
        "data.fallback",
        "",
        Check("'digits', or '' for none", lambda value: value in ("", "digits")),
        "digits: use these real images where the named ones cannot be had; empty: fail",
    ),
    Key("data.label", "", TEXT, "what summaries and tables call the data; the name if empty"),
    Key(
        "data.train_images",
        0,
        Check("a whole number above 0, or 0 for all", lambda value: value >= 0),
        "train on the first so many only; 0: on all",
    ),
    Key(
        "data.pipeline",
        "memory",
        one_of("memory", "stream"),
        "memory: all images are loaded; stream: array_record files are read while training",
    ),
    Key(
        "data.image_size",
        0,
        PIXELS,
        "stream: the side of the square cut out of each image; 0: they have one size already",
    ),
    Key(
        "data.shorter_side",
        0,
        PIXELS,
        "stream: what the shorter side is resized to before that; 0: to image_size",
    ),
    Key(
        "data.random_crop",
        False,
        FLAG,
        "stream: whether training draws where the square is; False: in the middle",
    ),
    Key(
        "data.workers",
        0,
        whole(0, MAX_WORKERS, f"a whole number up to {MAX_WORKERS:,}"),
        "stream: processes that read ahead; 0: threads instead; results do not depend on it",
    ),
)

# In the order in which it is done to the images of training, on the device.
AUGMENT_KEYS = (
    Key(
        "augment.flip",
        "none",
        one_of("none", "random", "alternating"),
        "mirror images: each time by chance, or a random half and then all every other epoch",
    ),
    Key("augment.translate", 0, PIXELS, "shift by up to so much; edges are reflected"),
    Key("augment.crop", 0, PIXELS, "shift by up to so much; what comes in is black"),
    Key("augment.brightness", 0.0, AMOUNT, "add up to so much, either way; white is 1"),
    Key("augment.contrast", 0.0, AMOUNT, "stretch about the mean by up to so much, either way"),
    Key("augment.cutout", 0, PIXELS, "blank a square with sides of so much"),
    Key("augment.mixup", 0.0, AMOUNT, "mix two images, by shares from Beta(so much, so much)"),
)
