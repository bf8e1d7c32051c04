"""Predicts how training scales to many chips, based on programs compiled for them.

    pip install libtpu jax-cuda12-plugin jax-cuda12-pjrt    # these two in jaxlib's version
    python scripts/scaling.py --chip v5e --network convnet --json scaling.jsonl
    python scripts/scaling.py --chip H100 --network resnet50 --dtype bfloat16 --json scaling.jsonl
    python scripts/scaling.py --network resnet50 --chip v5e --chip H100 --chips 8 --batch 32

The networks are those of configs/bn.py and configs/imagenet_resnet50.py, with their optimizers;
the last line prints memory and time of the latter with 256 images a step, as it is published.

No chip is needed, and nothing is measured. Each program is the step that `bnjax train` runs on the
given number of chips. The all-reduces are read from its text; memory and FLOPs come from the
compiler. The prediction is a model based on published speeds and on assumptions, which are printed.
Programs that are already in the file are not compiled again. `--cpu` times simulated devices and
processes here instead.
"""

import argparse
import functools
import importlib.metadata
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chips import Gpu, Tpu, chip_of, options_of

# isort: split
import jax
import numpy as np
import tqdm
from hlo import Reduction, reductions
from jax.sharding import NamedSharding, PartitionSpec
from links import BACKWARD, MACHINES, compute_seconds, step
from scaling_cpu import measure

from bnjax.train import build, parsing
from bnjax.train.devices import Over, Parallel, spread
from bnjax.train.optimizers import optimizer
from bnjax.train_step import init_state, train_step

CONFIGS = {"convnet": "bn", "resnet50": "imagenet_resnet50"}
CLASSES = {"convnet": 10, "resnet50": 1000}
EPOCH = {"convnet": 50_000, "resnet50": 1_281_167}  # training images
BATCHES = {"convnet": 512, "resnet50": 64}  # images a chip
IMAGE = {"convnet": (32, 32, 3), "resnet50": (224, 224, 3)}
COUNTS = {"v5e": (1, 4, 16, 64, 256), "v6e": (1, 4, 16, 64, 256), "H100": (1, 8)}
OVER: dict[str, Over] = {"global": "global", "groups of 8": 8, "per device": "per_device"}
PREDICTED = (1, 8, 64, 256, 1024)
LIMIT = 0.05  # of a step, that BN over all chips may cost
USES = ("gradients", "moments", "averages", "metrics")
KEYS = ("network", "chip", "dtype", "over", "batch")
HEADS = "network chip chips dtype BN-over gradients BN-moments BN-averages metrics most-combined"
HEADS += " GiB-a-chip GFLOP-a-chip GB-moved"
PARTS = "network chip dtype BN-over images-a-chip compiled-for chips compute-ms gradients-ms BN-ms"
PARTS += " images/s epoch-minutes efficiency BN-costs"
Case = dict[str, Any]


def network(name: str, dtype: str, parallel: Parallel | None = None) -> tuple[Any, Any]:
    """Returns a network, its batch norms bound to the axes of `parallel`, and its optimizer."""
    config = parsing.load(CONFIGS[name], [f"--config.model.dtype={dtype}"])
    axes = {} if parallel is None else parallel.norm_axes
    model = build.network(config.model, CLASSES[name], IMAGE[name], **axes)
    return model, optimizer(config, steps=100)


def compile_for(chip: Tpu | Gpu, case: Case) -> tuple[Any, float]:
    """Returns the compiled step, and the FLOPs of a chip by the program before compilation."""
    name, dtype, count = case["network"], case["dtype"], case["chips"]
    parallel = spread([*np.ravel(chip.devices(count))], OVER[case["over"]])
    bound, tx = network(name, dtype, parallel)
    make = functools.partial(train_step, model=bound, tx=tx)
    compiled = parallel.compile(
        lambda axis: functools.partial(make, axis_name=axis), (None, None, 0), donate_argnums=(0, 1)
    )
    plain, _ = network(name, dtype)
    untrained = functools.partial(init_state, plain, tx)
    image = np.zeros((1, *IMAGE[name]), np.uint8)
    state, stats = jax.eval_shape(untrained, jax.random.key(0), image)

    def batch_of(size: int) -> Any:
        shapes = {"image": ((size, *IMAGE[name]), np.uint8), "label": ((size,), np.int32)}
        return {key: jax.ShapeDtypeStruct(*shape) for key, shape in shapes.items()}

    def placed(tree: Any, *axes: Any) -> Any:
        sharding = NamedSharding(parallel.mesh, PartitionSpec(*axes))
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
        )

    each = case["batch"]
    whole, parts = placed((state, stats)), placed(batch_of(each * count), parallel.mesh.axis_names)
    program = compiled.lower(*whole, parts).compile(compiler_options=options_of(chip))
    alone = functools.partial(train_step, model=plain, tx=tx)
    cost = jax.jit(alone).lower(state, stats, batch_of(each)).cost_analysis() or {}
    return program, cost.get("flops", 0.0)


def facts(chip: Tpu | Gpu, case: Case) -> Case:
    """Returns facts about a program; bytes and FLOPs are those of one chip."""
    program, flops = compile_for(chip, case)
    memory, cost = program.memory_analysis(), program.cost_analysis() or {}
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return case | {
        "flops": cost.get("flops") or flops,
        "accessed_bytes": cost.get("bytes accessed") or 0.0,
        "peak_bytes": memory.argument_size_in_bytes + results + memory.temp_size_in_bytes,
        "memory": chip.memory,
        "reductions": [one._asdict() for one in reductions(program.as_text(), case["chips"])],
        "versions": versions(chip),
    }


def versions(chip: Tpu | Gpu) -> str:
    """Returns the name and version of the compiler."""
    plugin = "libtpu" if isinstance(chip, Tpu) else "jax-cuda12-plugin"
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", plugin))


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """Yields the programs to compile, small programs first."""
    for count, name, chip, dtype, over in itertools.product(
        args.chips or sorted(set(itertools.chain(*COUNTS.values()))),
        args.network or BATCHES,
        args.chip or COUNTS,
        args.dtype or ("bfloat16", "float32"),
        args.over or OVER,
    ):
        # One chip has nothing to choose, and eight or fewer are one group.
        is_other = over == "global" or count > (8 if over == "groups of 8" else 1)
        if is_other and (count in COUNTS[chip] or args.chips):
            batch = args.batch or BATCHES[name]
            own = {"network": name, "chip": chip, "chips": count, "dtype": dtype}
            yield own | {"over": over, "batch": batch}


def cells(found: Case) -> list[str]:
    """Returns a row of the table of programs."""
    reduced = [Reduction(**one) for one in found["reductions"]]
    row = [str(found[key]) for key in ("network", "chip", "chips", "dtype", "over")]
    for use in USES:
        own = [one for one in reduced if one.use == use]
        size = sum(one.bytes for one in own)
        hidden = sum(one.bytes for one in own if one.overlapped)
        text = f"{len(own)} of {size / 1e6:.3g} MB" if own else ""
        row.append(f"{text}, {hidden / size:.0%} async" if hidden else text)
    row.append(str(max((one.arrays for one in reduced), default=0) or ""))
    row.append(f"{found['peak_bytes'] / 2**30:.2f} of {found['memory'] >> 30}")
    return [
        *row,
        f"{found['flops'] / 1e9:,.0f}",
        f"{found['accessed_bytes'] / 1e9:.1f}".replace("0.0", "?"),
    ]


def table(heads: str, rows: list[list[str]]) -> str:
    """Returns a Markdown table; a hyphen in a heading is a space."""
    names = [head.replace("-", " ") for head in heads.split()]
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def largest(programs: list[Case]) -> list[Case]:
    """Returns the program for most chips of each network, chip, dtype and scope of BN."""
    found: dict[tuple[Any, ...], Case] = {}
    for one in sorted(programs, key=lambda one: one["chips"]):
        if one["chips"] > 1:
            found[tuple(one[key] for key in KEYS)] = one
    return list(found.values())


def accessed(found: Case, programs: list[Case]) -> float:
    """Returns the bytes that a chip reads and writes; those of a TPU if the compiler says none."""
    same = ("network", "dtype", "batch")
    others = (one for one in programs if all(one[key] == found[key] for key in same))
    return found["accessed_bytes"] or max(one["accessed_bytes"] for one in others)


def prediction(programs: list[Case], kept: list[Case], use: float) -> str:
    """Returns the predicted steps of each network, chip, dtype and scope of BN."""
    rows, limits = [], []
    for found in largest(programs):
        machine, dtype = MACHINES[found["chip"]], found["dtype"]
        moved = accessed(found, [*programs, *kept])
        compute = compute_seconds(machine, dtype, found["flops"], moved, use)
        reduced = [Reduction(**one) for one in found["reductions"]]
        predict = functools.partial(step, machine, compute, reduced, found["chips"])
        names = [str(found[key]) for key in KEYS]
        for chips in PREDICTED:
            one = predict(chips)
            parts = [f"{1e3 * part:.2f}" for part in (one.compute, one.gradients, one.norms)]
            rate = found["batch"] * chips / one.seconds
            speed = [f"{rate:,.0f}", f"{EPOCH[found['network']] / rate / 60:.2f}"]
            shares = [f"{one.compute / one.seconds:.0%}", f"{one.norm_share:.1%}"]
            rows.append([*names, str(found["chips"]), f"{chips:,}", *parts, *speed, *shares])
        above = [1 << i for i in range(1, 13) if predict(1 << i).norm_share > LIMIT]
        where = f"from {above[0]:,} chips on" if above else "nowhere up to 4,096 chips"
        limits.append(
            f"  {', '.join(names[:-1])}: {where}" + (" (no traffic)" if not moved else "")
        )
    lines = [table(PARTS, rows), f"BN over several chips costs more than {LIMIT:.0%} of a step:"]
    return "\n".join([*lines, *limits])


def assumptions(use: float, chips: set[str]) -> str:
    """Returns the assumptions of the prediction."""
    lines = [
        "These are predictions of a model, not measurements. Assumptions: a chip reaches "
        f"{use:.0%} of its peak speed for arithmetic or memory, whichever takes longer; a GPU's "
        "compiler does not report memory traffic, so the traffic of a TPU is used if one is "
        "in the table; an asynchronous all-reduce of gradients is hidden for up to "
        f"{BACKWARD:.0%} of the computation, and all others block; latencies are as below. Speeds "
        "are published; scripts/links.py has the sources."
    ]
    for name in sorted(chips):
        own = MACHINES[name]
        lines.append(
            f"  {name}: {own.peak['bfloat16'] / 1e12:,.0f} TFLOP/s in bfloat16, "
            f"{own.peak['float32'] / 1e12:,.0f} in float32 with default precision, memory "
            f"{own.memory / 1e9:,.0f} GB/s, links {own.link / 1e9:,.0f} GB/s per chip and "
            f"direction among {own.pod}, {own.network / 1e9:g} beyond; assumed "
            f"{own.hop * 1e6:g} us per hop, {own.far_hop * 1e6:g} beyond, "
            f"{own.start * 1e6:g} to start."
        )
    return "\n".join(lines)


def main() -> None:
    """Compiles the programs named on the command line and prints tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--network", choices=BATCHES, action="append", help="repeatable (default: both)"
    )
    parser.add_argument("--chip", choices=COUNTS, action="append", help="repeatable (default: all)")
    parser.add_argument(
        "--chips", type=int, action="append", help="number of chips; repeatable (default: 1 to 256)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), action="append")
    parser.add_argument("--over", choices=OVER, action="append", help="what BN normalises over")
    parser.add_argument("--batch", type=int, help=f"images per chip (default: {BATCHES})")
    parser.add_argument(
        "--use", type=float, default=0.4, help="assumed fraction of peak speed (default: 0.4)"
    )
    parser.add_argument(
        "--json", type=Path, help="a file with one line per program; existing lines are reused"
    )
    parser.add_argument(
        "--cpu", type=int, nargs="+", metavar="N", help="time N devices and processes on this CPU"
    )
    args = parser.parse_args()
    if args.cpu:
        print(measure(args.cpu))
        return
    asked = list(cases(args))
    lines = args.json.read_text().splitlines() if args.json and args.json.exists() else []
    kept = [json.loads(line) for line in lines]
    programs = []
    print(table(HEADS, []))
    with tqdm.tqdm(asked, unit="program", disable=not sys.stderr.isatty()) as bar:
        for case in bar:
            bar.set_postfix_str(" ".join(map(str, case.values())))
            found = next((one for one in kept if case.items() <= one.items()), None)
            if found is None:
                found = facts(chip_of(case["chip"]), case)
                if args.json:
                    with args.json.open("a") as file:
                        print(json.dumps(found), file=file)
            programs.append(found)
            tqdm.tqdm.write(table("", [cells(found)]).splitlines()[-1])
            sys.stdout.flush()
    print("\nCompiled by " + "; ".join(sorted({one["versions"] for one in programs})) + ".\n")
    print(assumptions(args.use, {one["chip"] for one in programs}))
    print(prediction(programs, kept, args.use))


if __name__ == "__main__":
    main()
