"""The tutorial's training step in PyTorch, for comparison with `scripts/bench.py`.

    python scripts/peers/step_torch.py FOLDER BATCH STEPS [--autocast] [--compile]

FOLDER holds CIFAR-10 in the binary version. Prints one JSON line with the median time of a step in
seconds (all steps but the first two) and the first losses. Weights are channels-last and Adam is
fused, which is fastest. Needs torch and NumPy, not bnjax; uses a GPU if torch has one.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

WARM_UP = 2


def network() -> nn.Sequential:
    """Returns the tutorial's network; torch's momentum is one minus Flax's."""
    layers: list[nn.Module] = []
    channels, side = 3, 32
    for filters, stride in ((30, 2), (50, 1), (60, 1)):
        layers += [nn.BatchNorm2d(channels, eps=1e-3, momentum=0.25)]
        layers += [nn.Conv2d(channels, filters, 3, stride), nn.ReLU()]
        channels, side = filters, (side - 3) // stride + 1
    layers.append(nn.Flatten())
    width = channels * side * side
    for units in (3500, 700, 10):
        layers += [nn.BatchNorm1d(width, eps=1e-3, momentum=0.25), nn.Linear(width, units)]
        layers += [nn.ReLU()] if units != 10 else []
        width = units
    for layer in layers:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("batch", type=int)
    parser.add_argument("steps", type=int)
    parser.add_argument("--autocast", action="store_true", help="bfloat16 products")
    parser.add_argument("--tf32", action="store_true", help="TF32 products on a GPU")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high" if args.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = args.tf32
    device = "cuda" if torch.cuda.is_available() else "cpu"
    files = sorted(args.folder.rglob("data_batch_[1-5].bin"))
    rows = np.concatenate([np.fromfile(file, np.uint8).reshape(-1, 3073) for file in files])
    images, labels = rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0].astype(np.int64)

    model = network().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    forward = torch.compile(model) if args.compile else model
    seconds, losses = [], []
    for step in range(args.steps):
        start = step * args.batch % (len(images) - args.batch + 1)
        began = time.perf_counter()
        x = torch.from_numpy(images[start : start + args.batch]).to(device).float().div_(255)
        y = torch.from_numpy(labels[start : start + args.batch]).to(device)
        x = x.contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=args.autocast):
            loss = nn.functional.cross_entropy(forward(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - began)
    step_s = float(np.median(seconds[WARM_UP:]))
    words = [word for word in ("autocast", "tf32", "compile") if getattr(args, word)]
    found = {
        "peer": " ".join([f"torch {torch.__version__}", *words]),
        "batch": args.batch,
        "step_s": step_s,
        "images_per_s": args.batch / step_s,
        "losses": losses[:6],
    }
    if device == "cuda":
        found |= {"peak_bytes": torch.cuda.max_memory_allocated()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
