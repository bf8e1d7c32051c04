"""The network of `kit_linen` in torch, its training, and its port into linen for the audit."""

import collections
import copy
import functools

import jax
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

from bnjax import clinic, norms
from bnjax.clinic.porting import converted_momentum, port_from, port_to
from zoo import kit, kit_linen

torch.set_num_threads(1)  # these networks are smaller than what a thread costs


def net(kind=nn.BatchNorm1d, dropout=(0.0, 0.0), momentum=0.9):
    """`momentum` is the fraction of the old average that is kept, as in the other libraries."""
    torch.manual_seed(0)
    norm = functools.partial(kind, momentum=1 - momentum)
    layers = {"flat": nn.Flatten(), "dense0": nn.Linear(64, 16), "norm0": norm(16)}
    layers |= {"act0": nn.ReLU(), "drop0": nn.Dropout(dropout[0])}
    layers |= {"dense1": nn.Linear(16, 16), "norm1": norm(16), "act1": nn.ReLU()}
    layers |= {"drop1": nn.Dropout(dropout[1]), "logits": nn.Linear(16, kit.CLASSES)}
    return nn.Sequential(collections.OrderedDict(layers))


def images(batch):
    return torch.from_numpy(batch["image"]).permute(0, 3, 1, 2)


def labels(batch):
    return torch.from_numpy(batch["label"]).long()


def loss(model, batch):
    return nn.functional.cross_entropy(model(images(batch)), labels(batch))


def step(model, optimizer, batch, *, loss=loss, mode=nn.Module.train):
    """One step of a training loop; `mode` sets the mode of the network."""
    mode(model)
    optimizer.zero_grad()
    loss(model, batch).backward()
    optimizer.step()


def sgd(model, rate=0.05):
    return torch.optim.SGD(model.parameters(), rate, momentum=0.9)


def fit(model=None, step=step, *, optimizer=sgd, seen=None, watch=None, before=None, **run):
    """Trains a torch network, and changes it; as `kit_linen.fit`.

    A step is a function of (model, optimizer, batch), and the optimizer one of the model; `before`
    is the network before a fine-tuning; `run` has facts about the training.
    """
    torch.manual_seed(1)
    model, seen = model or net(), kit.batches() if seen is None else seen
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR if optimizer is sgd else None
    optimizer = optimizer(model)
    schedule = cosine and cosine(optimizer, max(1, len(seen)))
    for batch in seen:
        step(model, optimizer, batch)
        if schedule:
            schedule.step()
        if watch:
            watch(model)
    run["step"] = lambda model, batch, given=None: step(model, given or sgd(model), batch)
    return kit.trained(model.eval(), seen, optimizer, **run).having(before=before)


def healthy():
    """The network that most twins are; each call trains another, as networks are changed."""
    return fit()


def predicting(model, train=False):
    """Returns images [n, h, w, c] -> logits, in training mode or not."""
    model = copy.deepcopy(model).train(train)
    return lambda image: model(images({"image": image})).detach().numpy()


def averaged(models, start, sick):
    """Returns `start` with the mean of the weights, and the statistics of the first if sick."""
    average = AveragedModel(models[0])
    for model in models:
        average.update_parameters(model)
    if not sick:
        update_bn(map(images, start.batches), average)
    return start.having(network=average.module.eval())


def ported(patient):
    """Returns the patient in linen, as `bnjax port` does it; its optimizer has no counterpart."""
    module, like = patient.network, patient.like
    if like is None:
        momentum = converted_momentum("torch", module.norm0.momentum)
        dropout = module.drop0.p, module.drop1.p
        like = kit_linen.net(norms.BatchNorm, dropout, momentum=momentum, variance="unbiased")
    init = functools.partial(like.init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), kit.examples()["image"][:2])

    def network(module):
        arrays = {name: leaf.numpy() for name, leaf in module.state_dict().items()}
        params, stats = port_from("torch", arrays, (shapes["params"], shapes["batch_stats"]))
        return clinic.linen(like, params, stats)

    def stepped(network_, batch):
        copied = copy.deepcopy(module)
        arrays = port_to("torch", network_.params, network_.batch_stats)
        copied.load_state_dict(
            {name: torch.from_numpy(leaf) for name, leaf in arrays.items()}, strict=False
        )
        patient.run.step(copied, batch)
        return network(copied)

    before = patient.before and network(patient.before)
    ported = patient.having(network=network(module))
    return ported.knowing(tx=None, step=stepped, before=before)
