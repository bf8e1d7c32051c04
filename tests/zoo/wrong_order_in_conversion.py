from zoo import kit

NAME = "blobs of another framework read in a wrong order"
CAUSE = "Scale, bias, mean and variance are read as mean, variance, scale and bias."
SOURCE = "https://github.com/hufu6371/DORN/issues/25"
FINDS = ("invalid-statistics",)


def linen(sick):
    patient = kit.healthy()
    if not sick:
        return patient
    params, stats = dict(patient.network.params), dict(patient.network.batch_stats)
    for name in stats:
        affine, average = params[name], stats[name]
        params[name] = {"scale": average["mean"], "bias": average["var"]}
        stats[name] = {"mean": affine["scale"], "var": affine["bias"]}
    return patient.but(params=params, batch_stats=stats)
