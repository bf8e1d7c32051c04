from zoo import kit

NAME = "checkpoint of the weights alone"
CAUSE = "The running statistics are not among the variables that are saved."
SOURCE = "https://github.com/hiwonjoon/tf-frrn/issues/2"
FINDS = ("missing-statistics",)


def linen(sick):
    return kit.healthy().but(batch_stats={}) if sick else kit.healthy()
