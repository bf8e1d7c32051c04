"""Trains airbench94 in PyTorch, for comparison with `configs/airbench94.py`.

    python scripts/peers/airbench94_torch.py FOLDER [--recipe muon|sgd] [--epochs N] [--images N]

FOLDER holds CIFAR-10 in the binary version. The recipe `muon` is that of `configs/airbench94.py`;
`sgd` is that of K. Jordan, "94 % on CIFAR-10 in 3.29 seconds on a single GPU" (arXiv 2404.00498,
2024), with a lookahead average of the weights. Prints one JSON line with the test accuracy with one
view and with six views, the seconds of training without loading and warm-up, and the number of
images. Needs torch and NumPy, not bnjax; uses a GPU in float16 if torch has one.
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, pad

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
WIDTHS, MOMENTUM, SMOOTHING, SHIFT = (64, 256, 256), 0.85, 0.2, 2


class Network(nn.Module):
    """Fixed whitening filters, three groups of two convolutions and a dense layer."""

    def __init__(self, scale: float) -> None:
        """Initialises all weights except the whitening filters."""
        super().__init__()
        self.scale = scale
        self.whiten = nn.Conv2d(3, 24, 2)
        self.whiten.weight.requires_grad_(False)
        nn.init.zeros_(self.whiten.bias)
        layers, channels = list[nn.Module](), 24
        for width in WIDTHS:
            for i in range(2):
                convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
                nn.init.dirac_(convolution.weight.data[:channels])
                norm = nn.BatchNorm2d(width, eps=1e-12, momentum=0.4)
                norm.weight.requires_grad_(False)
                layers += [convolution, nn.MaxPool2d(2) if i == 0 else nn.Identity()]
                layers += [norm, nn.GELU()]
                channels = width
        self.groups = nn.Sequential(*layers, nn.MaxPool2d(3), nn.Flatten())
        self.head = nn.Linear(channels, 10, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits."""
        return self.head(self.groups(gelu(self.whiten(images)))) * self.scale


def whitening(images: Tensor) -> Tensor:
    """Returns filters [24, 3, 2, 2] that whiten 2x2 patches; the second half is negated."""
    patches = images.float().unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5)
    patches = patches.reshape(-1, 12)
    patches = patches - patches.mean(0)
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    filters = (vectors / (values.clamp(min=0) + 5e-4).sqrt()).T.reshape(12, 3, 2, 2)
    return torch.cat([filters, -filters])


def augmented(images: Tensor, flipped: Tensor) -> Tensor:
    """Returns images, mirrored where `flipped` is True and shifted by up to two pixels."""
    images = torch.where(flipped[:, None, None, None], images.flip(3), images)
    n, _, side, _ = images.shape
    wide = pad(images, (SHIFT,) * 4, "reflect").permute(0, 2, 3, 1)
    starts = torch.randint(2 * SHIFT + 1, (2, n, 1), device=images.device)
    rows, columns = starts + torch.arange(side, device=images.device)
    number = torch.arange(n, device=images.device)[:, None, None]
    return wide[number, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


class Muon:
    """Orthogonal updates of kernels, which are rescaled to the norm sqrt(output channels)."""

    def __init__(self, kernels: list[nn.Parameter], rate: float, until: int):
        """Starts with momenta of zero."""
        self.param_groups = [{"lr": rate, "until": until}]  # as in torch's optimizers
        self.momenta = [(kernel, torch.zeros_like(kernel)) for kernel in kernels]

    @torch.no_grad()
    def step(self) -> None:
        """Takes a step."""
        for weight, total in self.momenta:
            total.mul_(0.6).add_(weight.grad)
            x = weight.grad.add(total, alpha=0.6).flatten(1)
            x = x.bfloat16() if x.is_cuda else x
            x = x / (x.norm() + 1e-7)
            is_tall = len(x) > x.shape[1]
            x = x.T if is_tall else x
            for _ in range(3):  # Newton-Schulz
                gram = x @ x.T
                x = 3.4576 * x + (2.0843 * gram @ gram - 4.7391 * gram) @ x
            x = x.T if is_tall else x
            weight.mul_(len(weight) ** 0.5 / weight.norm())
            update = x.reshape(weight.shape).to(weight.dtype)
            weight.sub_(update, alpha=self.param_groups[0]["lr"])


class Trainer:
    """A network with its optimizers, the schedules of their rates and the lookahead average."""

    def __init__(self, is_sgd: bool, images: Tensor, batch: int, steps: int, per_epoch: int):
        """Initialises everything; the images determine the whitening filters."""
        self.is_sgd, self.steps, self.done = is_sgd, steps, 0
        self.model = Network(1 / 9 if is_sgd else 1 / WIDTHS[-1])
        self.model.whiten.weight.data = whitening(images).cpu()
        if not is_sgd:
            self.model.head.weight.data /= self.model.head.weight.data.std()
        self.model.to(images.device, images.dtype, memory_format=torch.channels_last)
        norms = [one.float() for one in self.model.modules() if isinstance(one, nn.BatchNorm2d)]
        kernels = [one.weight for one in self.model.groups if isinstance(one, nn.Conv2d)]
        biases, head = [norm.bias for norm in norms], [self.model.head.weight]
        whiten = [self.model.whiten.bias]
        if is_sgd:  # the paper gives rate and decay for the sum over 1,024 images and all momentum
            unit = 1024 * (1 + 1 / (1 - MOMENTUM))
            rate, decay = 11.5 / unit, 0.0153 * batch / unit
            groups = [([*kernels, *head], rate, steps), (biases, 64 * rate, steps)]
            groups.append((whiten, 64 * rate, 3 * per_epoch))
        else:
            decay = 2e-6 * batch
            groups = [(head, 0.67, steps), (biases, 0.053, steps), (whiten, 0.053, 3 * per_epoch)]
        options = [
            {"params": params, "lr": rate, "weight_decay": decay / rate, "until": until}
            for params, rate, until in groups
        ]
        sgd = torch.optim.SGD(options, momentum=MOMENTUM, nesterov=True)
        self.optimizers = [sgd] if is_sgd else [sgd, Muon(kernels, 0.24, steps)]
        self.groups = [group for one in self.optimizers for group in one.param_groups]
        self.peaks = [group["lr"] for group in self.groups]
        state = self.model.state_dict().values()
        self.live = [one for one in state if one.is_floating_point()]
        self.slow = [one.clone() for one in self.live]

    def share(self, until: int) -> float:
        """Returns the rate of the next step as a fraction of the peak rate."""
        if not self.is_sgd:
            return max(0.0, 1 - self.done / until)
        share = float(np.interp(self.done / self.steps, (0, 0.23, 1), (0.2, 1, 0.07)))
        return share if self.done < until else 0.0

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Takes a step."""
        self.model.zero_grad()
        logits = self.model(images).float()
        cross_entropy(logits, labels, label_smoothing=SMOOTHING, reduction="sum").backward()
        for group, peak in zip(self.groups, self.peaks, strict=True):
            group["lr"] = peak * self.share(group["until"])
        for optimizer in self.optimizers:
            optimizer.step()
        self.done += 1
        if self.is_sgd and self.done % 5 == 0:
            self.look_ahead(0.95**5 * (self.done / self.steps) ** 3)
        if self.is_sgd and self.done == self.steps:
            self.look_ahead(1.0)

    @torch.no_grad()
    def look_ahead(self, kept: float) -> None:
        """Moves the average toward the weights, and sets the weights to the average."""
        for live, slow in zip(self.live, self.slow, strict=True):
            slow.lerp_(live, 1 - kept)
            live.copy_(slow)


@torch.no_grad()
def accuracies(model: nn.Module, images: Tensor, labels: Tensor) -> list[float]:
    """Returns the accuracy with one view of each image, and with six views."""
    model.eval()
    correct = np.zeros(2)
    for x, y in zip(images.split(2000), labels.split(2000), strict=True):
        wide, side = pad(x, (1,) * 4, "reflect"), x.shape[2]
        moved = [wide[:, :, i : i + side, i : i + side] for i in (0, 2)]
        once, *rest = (model(one) for view in (x, *moved) for one in (view, view.flip(3)))
        six = (once + rest[0]) / 4 + sum(rest[1:]) / 8
        correct += [int((logits.argmax(1) == y).sum()) for logits in (once, six)]
    return list(correct / len(images))


def load(files: list[Path], device: str) -> tuple[Tensor, Tensor]:
    """Returns standardised images, float16 on a GPU, and labels."""
    rows = np.concatenate([np.fromfile(file, np.uint8).reshape(-1, 3073) for file in files])
    images = torch.from_numpy(rows[:, 1:].reshape(-1, 3, 32, 32)).to(device).float() / 255
    mean, std = (torch.tensor(one, device=device).view(3, 1, 1) for one in (MEAN, STD))
    dtype = torch.float16 if device == "cuda" else torch.float32
    images = ((images - mean) / std).to(dtype, memory_format=torch.channels_last)
    return images, torch.from_numpy(rows[:, 0].astype(np.int64)).to(device)


def main() -> None:
    """Trains, evaluates and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=os.environ.get("DATA"))
    parser.add_argument("--recipe", choices=("muon", "sgd"), default="muon")
    parser.add_argument("--epochs", type=float, help="default: 8 with muon, 9.9 with sgd")
    parser.add_argument("--batch", type=int, help="default: 2,000 with muon, 1,024 with sgd")
    parser.add_argument("--images", type=int, help="train on the first images only")
    parser.add_argument("--seed", type=int, default=int(os.environ.get("SEED", "0")))
    parser.add_argument("--warm-up", type=int, default=20, help="steps before the clock starts")
    args = parser.parse_args()
    is_sgd, device = args.recipe == "sgd", "cuda" if torch.cuda.is_available() else "cpu"
    batch, epochs = args.batch or (1024 if is_sgd else 2000), args.epochs or (9.9 if is_sgd else 8)
    torch.backends.cudnn.benchmark = True
    files = sorted(Path(args.folder).rglob("data_batch_[1-5].bin"))
    images, labels = (one[: args.images] for one in load(files, device))
    per_epoch = len(images) // batch
    steps = round(epochs * per_epoch)

    def train(count: int) -> Trainer:
        torch.manual_seed(args.seed)
        trainer = Trainer(is_sgd, images[:5000], batch, steps, per_epoch)
        first = torch.rand(len(images), device=device) < 0.5
        for step in range(count):
            epoch, i = divmod(step, per_epoch)
            if i == 0:
                order = torch.randperm(len(images), device=device)
            rows = order[i * batch : (i + 1) * batch]
            flipped = first[rows] ^ (epoch % 2 == 1)
            trainer.step(augmented(images[rows], flipped), labels[rows])
        if device == "cuda":
            torch.cuda.synchronize()
        return trainer

    train(min(args.warm_up, steps))
    began = time.perf_counter()
    trainer = train(steps)
    seconds = time.perf_counter() - began
    plain, six = accuracies(
        trainer.model, *load([*Path(args.folder).rglob("test_batch.bin")], device)
    )
    found = {"peer": f"torch {torch.__version__}, {args.recipe}", "accuracy": plain}
    found |= {"accuracy_views": six, "seconds": seconds, "images": steps * batch}
    if device == "cuda":
        found |= {"peak_bytes": torch.cuda.max_memory_allocated()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
