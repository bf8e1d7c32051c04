import copy

from zoo.frozen_by_gradient import is_head, other_task

NAME = "a frozen norm that train() thaws"
CAUSE = "A norm is set to evaluation mode once; model.train() of the next epoch sets it back."
SOURCE = "https://github.com/pytorch/pytorch/issues/66073"
FINDS = ("moved-while-frozen",)


def nnx(sick):
    from zoo import kit_nnx

    before = kit_nnx.healthy()
    model = kit_nnx.of(before)
    model.norm0.eval()
    if sick:
        model.train()
    patient = kit_nnx.fit(model, wrt=is_head, seen=other_task(), steps=80)
    return patient.knowing(before=before.network, frozen=("norm0",))


def torch(sick):
    from zoo import kit_torch

    before = kit_torch.healthy().network
    model = copy.deepcopy(before).train()
    model.dense0.requires_grad_(False)
    model.norm0.eval().requires_grad_(False)

    def step(model, optimizer, batch):
        if sick:
            model.train()
        optimizer.zero_grad()
        kit_torch.loss(model, batch).backward()
        optimizer.step()

    return kit_torch.fit(model, step, seen=other_task(), steps=80, before=before, frozen=("norm0",))
