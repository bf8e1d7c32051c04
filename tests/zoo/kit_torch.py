"""The network of `kit` in torch, its training, and its port into linen, where it is audited."""

import collections
import copy
import functools

import jax
import torch
from torch import nn

from bnjax import clinic, norms
from bnjax.clinic import Run
from bnjax.clinic.porting import converted_momentum, port_from, port_to
from zoo import kit

torch.set_num_threads(1)  # these networks are smaller than what a thread costs


def net(norm=nn.BatchNorm1d, dropout=(0.0, 0.0)):
    torch.manual_seed(0)
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
    return nn.functional.cross_entropy(
        model(images(batch)), torch.from_numpy(batch["label"]).long()
    )


def step(model, optimizer, batch, *, loss=loss, train=True):
    """One step of a training loop."""
    model.train(train)
    optimizer.zero_grad()
    loss(model, batch).backward()
    optimizer.step()


def sgd(model, rate=0.05):
    return torch.optim.SGD(model.parameters(), rate, momentum=0.9)


def fit(model=None, step=step, *, optimizer=sgd, seen=None, watch=None, before=None, **run):
    """Trains a torch network; returns it as a patient, with the facts that a user knows.

    Args:
        model: the network; it is changed.
        step: (model, optimizer, batch) -> None.
        optimizer: model -> optimizer.
        seen: the batches of the training.
        watch: called with the network after each step.
        before: the network before a fine-tuning.
        run: facts about the training.
    """
    torch.manual_seed(1)
    model, seen = model or net(), kit.batches(kit.STEPS) if seen is None else seen
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR if optimizer is sgd else None
    optimizer = optimizer(model)
    schedule = cosine and cosine(optimizer, max(1, len(seen)))
    for batch in seen:
        step(model, optimizer, batch)
        if schedule:
            schedule.step()
        if watch:
            watch(model)
    facts = {"steps": len(seen), "batch_size": kit.SIZE, "tx": optimizer} | run
    facts["step"] = lambda model, batch, given=None: step(model, given or sgd(model), batch)
    return kit.Patient(model.eval(), kit.audited(facts["batch_size"]), Run(**facts), before=before)


def healthy():
    """The network that most twins are."""
    return fit()


def predicting(model, train=False):
    """Returns images [n, h, w, c] -> logits, in training mode or not."""
    model = copy.deepcopy(model).train(train)
    return lambda image: model(images({"image": image})).detach().numpy()


def ported(patient):
    """Returns the patient in linen, as `bnjax port` does it; its optimizer has no counterpart."""
    module = patient.network
    like = patient.like
    if like is None:
        momentum = converted_momentum("torch", module.norm0.momentum)
        norm = functools.partial(norms.BatchNorm, momentum=momentum, variance="unbiased")
        like = kit.Net(norm, (module.drop0.p, module.drop1.p))
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
    ported = kit.Patient(network(module), patient.batches, patient.run)
    return ported.knowing(tx=None, step=stepped, before=before)
