from zoo import kit

NAME = "layer renamed, checkpoint restored without strict checks"
CAUSE = "The statistics of a renamed layer match no layer: they are dropped and the layer has none."
SOURCE = "https://github.com/pytorch/pytorch/pull/6086"
FINDS = ("unmatched-leaves",)


def linen(sick):
    patient = kit.healthy()
    stats = dict(patient.network.batch_stats)
    stats["bn2" if sick else "norm1"] = stats.pop("norm1")
    return patient.but(batch_stats=stats)
