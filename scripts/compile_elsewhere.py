"""Compiles training for TPUs and GPUs that are not installed, and prints the results.

    pip install libtpu jax-cuda12-plugin jax-cuda12-pjrt    # these two in jaxlib's version
    python scripts/compile_elsewhere.py --chip T4 --chip v5e

    python scripts/compile_elsewhere.py --chip v5e --devices 1 --config configs/speed94.py --seeds 8

No CUDA is needed. The network is that of the config (default: the tutorial's network). Programs:
`train_step` and `eval_step`, compiled by jax.jit with the batch divided among the devices; and
`loop`, up to 100 steps on one device with resident images, as in `bnjax train` or, with several
seeds, in `bnjax compare`. Memory is that of one device.
"""

import argparse
import collections
import functools
import itertools
import json
import re
from pathlib import Path
from typing import Any

from chips import CHIPS, Gpu, Tpu, chip_of, options_of

# isort: split
import jax
import numpy as np
from hlo import arrays, bytes_of, operations
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.stages import Compiled
from ml_collections import ConfigDict

from bnjax.data.datasets import Dataset, Split
from bnjax.data.feed import resident_feed
from bnjax.train import build, parsing
from bnjax.train.optimizers import optimizer
from bnjax.train.steps import training_program
from bnjax.train_step import eval_step, init_state, train_step

IMAGE, EXAMPLES, STEPS = (32, 32, 3), 50_000, 100
PROGRAMS, DTYPES = ("train", "eval", "loop"), ("float32", "bfloat16")
DONATED = re.compile(r"\{\d*\}: \((\d+), \{\}, \w+-alias\)")
IN_ORDER = re.compile(r"dimensions={(0,1|0,1,2|0,1,2,3)}")  # of a transpose that moves nothing
LIBRARY = re.compile(r'custom_call_target="__(cudnn|cublas)')
CALLBACK = re.compile(r'custom_call_target="[^"]*callback')
HOST = ("infeed", "outfeed", "send", "recv")


def compile_for(
    config: ConfigDict, chip: Tpu | Gpu, count: int, name: str, seeds: int = 1
) -> Compiled:
    """Returns a program compiled for chips that need not be installed.

    Args:
        config: the config of training.
        chip: the chip to compile for.
        count: the number of chips among which the batch is divided.
        name: "train", "eval" or "loop".
        seeds: the number of seeds that the loop trains in parallel.
    """
    size = config.train.batch_size
    model, tx = build.network(config.model, 10, IMAGE), optimizer(config, 1)
    mesh = Mesh(np.array(chip.devices(count)), ("data",), axis_types=(AxisType.Auto,))

    def array(shape: tuple[int, ...], dtype: Any, *axes: str) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    untrained = functools.partial(init_state, model, tx)
    shapes = jax.eval_shape(untrained, jax.random.key(0), np.zeros((1, *IMAGE), np.uint8))
    state, stats = jax.tree.map(lambda leaf: array(leaf.shape, leaf.dtype), shapes)
    image, label = array((size, *IMAGE), np.uint8, "data"), array((size,), np.int32, "data")
    batch = {"image": image, "label": label}
    step = functools.partial(train_step, model=model, tx=tx)
    if name == "train":
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(state, stats, batch)
    elif name == "eval":
        test = jax.jit(functools.partial(eval_step, model=model))
        lowered = test.lower(state.params, stats, batch)
    else:
        images = np.zeros((EXAMPLES, *IMAGE), np.uint8)
        split = Split(images, np.zeros(EXAMPLES, np.int32))
        data = Dataset("cifar10", "cifar10", None, split, split, tuple("abcdefghij"))
        feed = resident_feed(split, size, shuffle=False, max_steps=STEPS)
        many = training_program(build.experiment(config, data), feed, seeds)
        resident = jax.tree.map(lambda leaf: array(leaf.shape, leaf.dtype), feed.resident)
        side = (seeds,) if seeds > 1 else ()
        state, stats = jax.tree.map(
            lambda leaf: array((*side, *leaf.shape), leaf.dtype), (state, stats)
        )
        bad_steps, taken = array(side, np.int32), array((), np.int32)
        numbers = array((STEPS, *side, size), np.int32)
        items = {"index": numbers, "epoch": numbers}
        loop = jax.jit(many, donate_argnums=(0, 1))
        lowered = loop.lower(state, stats, bad_steps, resident, items, taken)
    return lowered.compile(compiler_options=options_of(chip))


def facts(compiled: Compiled) -> dict[str, Any]:
    """Returns facts about a compiled program.

    * `temp_bytes`, `peak_bytes`: for one device; `accessed_bytes`: None if it is not reported.
    * `donated`: the number of arguments whose memory is reused for results.
    * `all_reduces`: for each all-reduce, the bytes that one device contributes.
    * `loops`, `host_transfers`: their numbers.
    * `products`: counts of convolutions and matrix products for each operand dtype.
    * `not_in_library`: convolutions that are not library calls; always 0 on a TPU.
    * `copied`: each shape of 10 MB or more that is copied or transposed.
    """
    text, memory, cost = compiled.as_text(), compiled.memory_analysis(), compiled.cost_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    lines = operations(text)
    dtype_of = {name: (arrays(of) or [("", ())])[0][0] for name, of, *_ in lines}
    kinds = collections.Counter(line.kind for line in lines)
    reduced, copied, products = [], set(), collections.Counter()
    for _, of, kind, names, rest in lines:
        if kind in ("all-reduce", "all-reduce-start"):
            # One that is only started shows its operands, and then its results.
            reduced.append(sum(map(bytes_of, arrays(of)[: len(names)])))
        if kind == "copy" or (kind == "transpose" and not IN_ORDER.search(rest)):
            large = [array for array in arrays(of) if bytes_of(array) >= 10e6]
            copied |= {f"{dtype}{list(shape)}" for dtype, shape in large}
        if kind in ("convolution", "dot") or LIBRARY.search(rest):
            products[dtype_of[names[0]]] += 1
    return {
        "temp_bytes": memory.temp_size_in_bytes,
        "peak_bytes": memory.argument_size_in_bytes + results + memory.temp_size_in_bytes,
        "accessed_bytes": (cost or {}).get("bytes accessed"),
        "donated": len(set(DONATED.findall(text.partition("\n")[0]))),
        "all_reduces": reduced,
        "loops": kinds["while"],
        "host_transfers": sum(kinds[kind] for kind in HOST) + len(CALLBACK.findall(text)),
        "products": dict(products),
        "not_in_library": kinds["convolution"],
        "copied": sorted(copied),
    }


def row(found: dict[str, Any]) -> str:
    """Returns facts as a line of the table."""
    reduced, accessed = found["all_reduces"], found["accessed_bytes"]
    cells = (
        *(found[key] for key in ("chip", "devices", "program", "dtype")),
        *(f"{found[key] / 1e9:.2f}" for key in ("temp_bytes", "peak_bytes")),
        "" if accessed is None else f"{accessed / 1e9:.1f}",
        f"{len(reduced)} of {sum(reduced) / 1e6:.1f} MB" if reduced else "",
        ", ".join(f"{count} {dtype}" for dtype, count in found["products"].items()),
        ", ".join(found["copied"]),
    )
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    """Compiles the programs named on the command line and prints their facts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--chip", choices=CHIPS, action="append", help="repeatable (default: all)")
    parser.add_argument("--devices", type=int, help="number of chips (default: one, and several)")
    parser.add_argument("--config", default="bn", help="file or name of a config (default: bn)")
    parser.add_argument("--batch", type=int, help="images per step (default: from the config)")
    parser.add_argument("--seeds", type=int, default=1, help="with more than 1: only the loop")
    parser.add_argument("--json", action="store_true", help="print all facts as JSON lines")
    parser.add_argument("--hlo", type=Path, metavar="DIR", help="save the programs in DIR")
    args = parser.parse_args()
    if not args.json:
        print("| chip | devices | program | dtype | temporary GB | in all GB | accessed GB", end="")
        print(" | all-reduces | products | copied |", "|---" * 10 + "|", sep="\n")
    for name in args.chip or CHIPS:
        chip = chip_of(name)
        counts = [args.devices] if args.devices else chip.counts
        names = PROGRAMS if args.seeds == 1 else ("loop",)
        programs = [(count, program) for count in counts for program in names]
        for (count, program), dtype in itertools.product(programs, DTYPES):
            if count > 1 and program == "loop":  # bnjax.main trains on one device
                continue
            config = parsing.load(args.config, [])
            config.model.dtype = dtype
            config.train.batch_size = args.batch or config.train.batch_size
            compiled = compile_for(config, chip, count, program, args.seeds)
            case = {"chip": name, "devices": count, "program": program, "dtype": dtype}
            found = case | {"memory": chip.memory} | facts(compiled)
            print(json.dumps(found) if args.json else row(found), flush=True)
            if args.hlo:
                path = args.hlo / f"{name}-{count}-{program}-{dtype}.txt"
                path.write_text(compiled.as_text() or "")


if __name__ == "__main__":
    main()
