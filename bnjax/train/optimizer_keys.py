"""The keys of the config that say how the weights are updated."""

from bnjax.train.allowed import AMOUNT, FLAG, FRACTION, POSITIVE, STEP, Check, Key, one_of, whole

OPTIMIZER_KEYS = (
    Key("optimizer.name", "adam", one_of("adam", "sgd", "muon"), "which optimizer"),
    Key("optimizer.learning_rate", 1e-3, POSITIVE, "the highest over the run"),
    Key(
        "optimizer.schedule",
        "constant",
        one_of("constant", "linear", "cosine", "one_cycle"),
        "how the rate goes from there to 0: not at all, in a line or along a cosine; one_cycle: up "
        "from a 25th of it, and down, along cosines",
    ),
    Key(
        "optimizer.warmup",
        0.0,
        FRACTION,
        "the fraction of the steps in which the rate first rises, from 0 in a line",
    ),
    Key(
        "optimizer.loss",
        "mean",
        one_of("mean", "sum"),
        "whether rates and decay are meant for the gradient of the mean of a batch's losses, or of "
        "their sum; metrics are means always",
    ),
    Key(
        "optimizer.weight_decay",
        0.0,
        AMOUNT,
        "sgd: times the weight is added to the gradient; adam: to the step, before the rate "
        "(AdamW); muon: to the steps of what it leaves to sgd, as if their highest rate were 1",
    ),
    Key(
        "optimizer.decay",
        "kernels",
        one_of("kernels", "all"),
        "what weight_decay is for: the kernels of convolutions and dense layers, or biases and "
        "scales too",
    ),
    Key("optimizer.b1", 0.9, FRACTION, "adam: the decay of the mean gradient"),
    Key("optimizer.b2", 0.999, FRACTION, "adam: the decay of the mean squared gradient"),
    Key("optimizer.eps", 1e-8, POSITIVE, "adam: what is added to the root of the latter"),
    Key(
        "optimizer.momentum",
        0.0,
        FRACTION,
        "sgd, muon: the fraction of the last update that is kept",
    ),
    Key("optimizer.nesterov", False, FLAG, "sgd: whether to look one update ahead; muon does"),
    Key("muon.bias_rate", 0.05, POSITIVE, "of biases and scales, which sgd trains"),
    Key("muon.head_rate", 0.5, POSITIVE, "of dense kernels, which sgd trains"),
    Key("muon.momentum", 0.85, FRACTION, "of that sgd; with Nesterov's look ahead"),
    Key(
        "muon.whiten_steps",
        0,
        whole(0),
        "speednet: steps after which the bias of the whitening is no longer trained; 0: all",
    ),
    Key(
        "muon.rescale_every",
        (1, 0),
        Check(
            "two whole numbers, the first above 0",
            lambda value: (
                len(value) == 2
                and all(type(one) is int for one in value)
                and value[0] > 0
                and value[1] >= 0
            ),
        ),
        "(a, b): kernels of convolutions are rescaled to the norm sqrt(output channels) each a "
        "steps, and later more seldom: each a + int(b * the part of training that is over)",
    ),
    Key(
        "optimizer.average",
        "none",
        one_of("none", "ema", "swa"),
        "the mean of which weights is evaluated and predicted with, always under precise "
        "statistics of its own (eval.precise_images); training goes on without it",
    ),
    Key("optimizer.average_decay", 0.99, FRACTION, "ema: the fraction that a step keeps"),
    Key("optimizer.average_start", 1, STEP, "the first step whose weights are averaged"),
    Key("optimizer.average_every", 1, STEP, "from there on, how many steps lie between two"),
)
