"""The keys of the config that say which network there is."""

import math

from bnjax.train.allowed import (
    DTYPE,
    FLAG,
    FRACTION,
    POSITIVE,
    SIZES,
    Check,
    Key,
    each,
    one_of,
    whole,
)

NETWORKS = ("convnet", "speednet", "resnet18", "resnet20", "resnet50")

MODEL_KEYS = (
    Key("model.name", "convnet", one_of(*NETWORKS), "which network; convnet: the tutorial's"),
    Key(
        "model.mean",
        (),
        each("numbers", math.isfinite),
        "what is subtracted from the pixels of each channel first; white is 1; empty: nothing",
    ),
    Key(
        "model.std",
        (),
        each("numbers above 0", POSITIVE.holds),
        "what they are then divided by; empty: nothing",
    ),
    Key(
        "model.filters",
        (30, 50, 60),
        SIZES,
        "convnet: of each convolution; speednet: of each group of two",
    ),
    Key(
        "model.whiten_images",
        5000,
        whole(1),
        "speednet: training images whose 2x2 patches its first convolution whitens",
    ),
    Key("model.kernels", (3, 3, 3), SIZES, "the sides of the convolutions' kernels"),
    Key("model.strides", (2, 1, 1), SIZES, "of the convolutions, or of the pooling after them"),
    Key(
        "model.pooling",
        "none",
        one_of("none", "max", "avg"),
        "none: strided convolutions; max, avg: pool by the stride instead",
    ),
    Key("model.dense", (3500, 700), SIZES, "the widths of the hidden dense layers"),
    Key(
        "model.dropout",
        (0.0, 0.0),
        each(
            "fractions from 0 up to but not including 1",
            lambda rate: isinstance(rate, int | float) and 0 <= rate < 1,
        ),
        "the fraction that is dropped after each hidden dense layer",
    ),
    Key(
        "model.norm",
        "batch",
        one_of("batch", "ghost", "renorm", "layer", "group", "instance", "rms", "frn", "none"),
        "which normalisation",
    ),
    Key(
        "model.norm_dense",
        (True, True),
        each("True or False for each hidden dense layer", FLAG.holds),
        "whether the output of each hidden dense layer is normalised",
    ),
    Key(
        "model.placement",
        "input",
        one_of("input", "before", "after"),
        "of the norms: at the input of each layer, or before or after its activation; of a ResNet: "
        "input is norm, activation, convolution, before is convolution, norm, activation",
    ),
    Key(
        "model.momentum",
        0.75,
        Check(f"{FRACTION.words} (the fraction of the old average that is kept)", FRACTION.holds),
        "of the running averages: the fraction of the old average that a step keeps",
        "momentum",
    ),
    Key("model.debias", False, FLAG, "whether averages leave their starting values out", "debias"),
    Key(
        "model.variance",
        "biased",
        one_of("biased", "unbiased"),
        "what the average stores: the variance divided by n, or by n - 1",
        "variance",
    ),
    Key(
        "model.average_dtype",
        "float32",
        DTYPE,
        "what the running averages are rounded to after each step; bfloat16 is for studies",
        "average_dtype",
    ),
    Key(
        "model.statistics_over",
        "global",
        Check(
            "global, per_device, or a number of devices",
            lambda value: value in ("global", "per_device") or (value.isdecimal() and value > "0"),
        ),
        "batch norms normalise over the batch of all devices, of each, or of so many together; "
        "running averages are always those of all",
    ),
    Key("model.virtual_batch", 50, whole(2), "ghost: images of a virtual batch", "virtual_batch"),
    Key("model.renorm_steps", 40_000, whole(2), "renorm: when its limits are open", "renorm_steps"),
    Key("model.groups", 10, whole(1), "group: how many groups of channels", "groups"),
    Key("model.epsilon", 1e-3, POSITIVE, "what is added to variances", "epsilon"),
    Key(
        "model.activation",
        "relu",
        one_of("relu", "sigmoid", "tanh", "gelu", "silu"),
        "of each hidden layer; norm frn brings its own",
    ),
    Key("model.scale", True, FLAG, "whether norms learn a scale for each channel", "use_scale"),
    Key("model.shift", True, FLAG, "whether norms learn a shift for each channel", "use_bias"),
    Key("model.weight_standardization", False, FLAG, "of the convolutions' kernels"),
    Key(
        "model.dtype",
        "float32",
        one_of("float32", "bfloat16", "auto"),
        "of the arithmetic; parameters, statistics and metrics are float32, while gradients of "
        "kernels are of this dtype until they have been summed over devices; auto: bfloat16 on "
        "accelerators, float32 on CPUs",
    ),
    Key(
        "model.dense_product",
        "float32",
        DTYPE,
        "what the dense layers multiply; bfloat16 is for CPUs that are faster at it",
    ),
)
