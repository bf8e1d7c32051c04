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


def torch(sick):
    from zoo import kit_torch

    patient = kit_torch.healthy()
    return patient.knowing(predict=kit_torch.predicting(patient.network, train=sick))
