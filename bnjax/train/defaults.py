"""The default config: the tutorial's network and training, every number in one place.

A config file takes this, changes what it is about and returns it from `get_config`.
"""

import ml_collections

# For claims that are tried at a small budget: a tenth of the images in batches of a tenth, so that an epoch is still 10 steps, and a narrow
# network: half a million multiplications an image forward instead of 34 million.
SMALL = {
    "data.train_images": 5000,
    "model.filters": (8, 12, 16),
    "model.dense": (64, 32),
    "model.groups": 4,
    "train.batch_size": 500,
    "train.steps": 100,
}


def get_config() -> ml_collections.ConfigDict:
    """Returns the defaults; every key that exists is here."""
    config = ml_collections.ConfigDict()
    config.name = ""  # of the run; the file's name if empty
    config.seed = 0

    config.data = ml_collections.ConfigDict()
    config.data.name = "cifar10"  # cifar10, cifar100, digits, or a data set of TensorFlow Datasets
    config.data.dir = (
        ""  # a folder with cifar-10-batches-bin or cifar-10-binary.tar.gz, or a TFDS data_dir
    )
    config.data.fallback = (
        ""  # "digits": use these real images where the named ones cannot be had; "": fail
    )
    config.data.label = ""  # what summaries and tables call the data; the name if empty
    config.data.train_images = 0  # train on the first so many only; 0: on all

    config.model = ml_collections.ConfigDict()
    config.model.filters = (30, 50, 60)
    config.model.kernels = (3, 3, 3)
    config.model.strides = (2, 1, 1)
    config.model.pooling = (
        "none"  # none: strided convolutions; max, avg: pool by the stride instead
    )
    config.model.dense = (3500, 700)
    config.model.dropout = (0.0, 0.0)  # after each hidden dense layer
    config.model.norm = "batch"  # batch, ghost, renorm, layer, group, instance, rms, frn, none
    config.model.norm_dense = (True, True)  # is the output of each hidden dense layer normalised?
    config.model.placement = "input"  # of each layer; or before, after the activation
    config.model.momentum = 0.75  # the fraction of the old average that is kept
    config.model.debias = False  # leave the starting values of the averages out of them
    config.model.variance = "biased"  # what the average stores: divided by n; or unbiased, by n - 1
    config.model.virtual_batch = 50  # examples of a virtual batch of norm ghost
    config.model.renorm_steps = 40000  # when the limits of norm renorm are fully open
    config.model.groups = 10  # of channels, of norm group
    config.model.epsilon = 1e-3
    config.model.activation = "relu"  # relu, sigmoid, tanh; norm frn brings its own
    config.model.scale = True
    config.model.shift = True
    config.model.weight_standardization = False  # of the convolutions
    config.model.dtype = "float32"  # of the arithmetic: float32, bfloat16; parameters, statistics and sums are float32
    config.model.dense_product = "float32"  # what the dense layers multiply: float32, bfloat16 (for CPUs that are faster at it)

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.name = "adam"  # adam, sgd
    config.optimizer.learning_rate = 1e-3
    config.optimizer.b1 = 0.9  # adam
    config.optimizer.b2 = 0.999  # adam
    config.optimizer.eps = 1e-8  # adam
    config.optimizer.momentum = 0.0  # sgd

    # Durations are given in steps or in epochs: exactly one of the two is not 0.
    config.train = ml_collections.ConfigDict()
    config.train.steps = 100
    config.train.epochs = 0.0
    config.train.batch_size = 5000
    config.train.shuffle = False  # False: the order of the files, as in the tutorial
    config.train.target_loss = 0.2  # the summary says when the training loss first got there
    config.train.stop_at_loss = (
        0.0  # end training when the loss of a step first is at or below it; 0: take every step
    )

    config.train.on_nonfinite = (
        "stop"  # stop, skip: what to do with a step whose loss or gradient is not finite
    )
    config.train.most_skipped = 10  # skip: stop after more than so many in a row

    config.eval = ml_collections.ConfigDict()
    config.eval.every_steps = 0
    config.eval.every_epochs = 2.0
    config.eval.batch_size = 1000
    config.eval.histograms = 256  # training images whose activations and gradients are summed up at each evaluation; 0 for none
    config.eval.pictures = 12  # test images that TensorBoard shows with their predictions at each evaluation; 0 for none

    # Each evaluation is followed by a checkpoint; further ones in between, 0 for none. Set at most one.
    config.checkpoint = ml_collections.ConfigDict()
    config.checkpoint.every_steps = 0
    config.checkpoint.every_epochs = 0.0
    config.checkpoint.every_minutes = 0.0
    return config
