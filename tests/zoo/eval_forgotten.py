from zoo import kit

NAME = "evaluation in training mode"
CAUSE = "model.eval() is missing: evaluation normalises by its own batch."
SOURCE = "https://github.com/chrischoy/SpatioTemporalSegmentation/issues/11"
FINDS = ("batch-dependent",)


def linen(sick):
    network = kit.healthy().network
    variables = {"params": network.params, "batch_stats": network.batch_stats}

    def predict(images):
        return network.model.apply(variables, images, sick, mutable=["batch_stats"])[0]

    return kit.healthy().knowing(predict=predict)


def nnx(sick):
    from zoo import kit_nnx

    model = kit_nnx.of(kit_nnx.healthy())
    model.train() if sick else model.eval()
    return kit_nnx.healthy().knowing(predict=model)


def equinox(sick):
    import jax
    from equinox.nn import inference_mode

    from zoo import kit_equinox

    network = kit_equinox.healthy().network
    model = inference_mode(network.model, not sick)

    def predict(images):
        key = jax.random.key(0)
        each = jax.vmap(model, (0, None, None), (0, None), axis_name="batch")
        return each(images, network.state, key)[0]

    return kit_equinox.healthy().knowing(predict=predict)


def torch(sick):
    from zoo import kit_torch

    patient = kit_torch.healthy()
    patient.network.train(sick)
    return patient.knowing(predict=kit_torch.predicting(patient.network, train=sick))
