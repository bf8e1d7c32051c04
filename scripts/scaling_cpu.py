"""Measures the overhead of simulated devices and of several processes on one machine."""

import functools
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from typing import Any

IMAGES, STEPS = 64, 12
NOTE = """\
Simulated devices and processes share the same cores, so the table shows only overhead: the ratio of
the time to that of one device with as many images (below 1 if one device leaves cores idle). The
table says nothing about speed on several machines. The network is the tutorial's with a tenth of
its dense units."""


def measure(counts: list[int]) -> str:
    """Returns a table of step times: strong (fixed total), weak (fixed per device)."""
    rows, alone = [], {}
    for count in sorted({1, *counts}):
        for scaling in ("strong", "weak"):
            total = IMAGES * (count if scaling == "weak" else max(counts))
            if total not in alone:
                alone[total] = run(1, 1, total)
            for kind in ("devices", "processes") if count > 1 else ("devices",):
                shape = (1, count) if kind == "devices" else (count, 1)
                seconds = run(*shape, total) if count > 1 else alone[total]
                over = f"{seconds / alone[total]:.2f}"
                row = (f"{count} {kind}", scaling, str(total), f"{1e3 * seconds:.1f}", over)
                print(f"| {' | '.join(row)} |", file=sys.stderr, flush=True)
                rows.append(row)
    heads = ("over", "scaling", "images", "ms a step", "times one device")
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join([NOTE, "", *(f"| {' | '.join(line)} |" for line in lines)])


def run(processes: int, devices: int, total: int) -> float:
    """Returns the median seconds of a step with these numbers of processes and devices."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={devices}"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, *map(str, (processes, i, port, total))],
            env=env,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]
    said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"a process of {processes} with {devices} devices failed: see above")
    return float(json.loads(said[0].splitlines()[-1]))


def train(processes: int, process: int, port: int, total: int) -> float:
    """Returns the median time of a step in this process, one of several."""
    import jax
    import numpy as np
    import optax

    from bnjax import norms
    from bnjax.models.convnet import ConvNet
    from bnjax.train.cpu import compiler_options
    from bnjax.train.devices import join_processes, spread
    from bnjax.train_step import init_state, train_step

    if processes > 1:
        join_processes(f"127.0.0.1:{port}", processes, process)
    parallel = spread(jax.devices())
    norm = norms.build("batch", momentum=0.9, **parallel.norm_axes)
    model, tx = ConvNet(dense=(350, 70), norm=norm), optax.sgd(0.1)

    def make(axis: Any) -> Any:
        return functools.partial(train_step, model=model, tx=tx, axis_name=axis)

    options = {"donate_argnums": (0, 1), "compiler_options": compiler_options()}
    compiled = parallel.compile(make, (None, None, 0), **options)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (total, 32, 32, 3), np.uint8),
        "label": rng.integers(0, 10, total).astype(np.int32),
    }
    state = parallel.put(init_state(model, tx, jax.random.key(0), batch["image"][:1]), None)
    part, seconds = parallel.put(parallel.part.of(batch), 0), []
    for _ in range(STEPS):
        began = time.perf_counter()
        state = jax.block_until_ready(compiled(*state, part))[:2]
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[2:])  # the first one compiles


if __name__ == "__main__":
    print(json.dumps(train(*map(int, sys.argv[1:]))))
