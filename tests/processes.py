"""Trainings in processes of their own, on this machine."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from bnjax.train.checkpoint import RECORD
from bnjax.train.jsonl import read_lines

CONFIG = Path(__file__).parents[1] / "configs" / "digits.py"


class Together:
    """Processes that train together, each with so many devices; what they say is in files.

    A pipe that nobody reads would fill up, and the process wait for ever.
    """

    def __init__(self, workdir, processes, devices, overrides, own):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "bnjax.main", "train", "--config", str(CONFIG)]
        command += ["--workdir", str(workdir), *overrides]
        if processes > 1:
            command += ["--coordinator", f"127.0.0.1:{port}", "--processes", str(processes)]
        env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        self.workdir, self._said = workdir, []
        self.processes = []
        for i in range(processes):
            words = [*command, *(own[i] if own else [])]
            words += ["--process", str(i)] if processes > 1 else []
            self._said.append([workdir.with_name(f"{port}-{i}.{of}") for of in ("out", "err")])
            with contextlib.ExitStack() as stack:
                out, err = (stack.enter_context(path.open("w")) for path in self._said[-1])
                self.processes.append(subprocess.Popen(words, env=env, stdout=out, stderr=err))

    def said(self):
        """What each has printed so far, and its errors."""
        return [tuple(path.read_text() for path in paths) for paths in self._said]

    def finish(self, timeout=900):
        """Waits for all; the exit codes."""
        until = time.monotonic() + timeout
        return [
            process.wait(timeout=max(1, until - time.monotonic())) for process in self.processes
        ]

    def wait_for_checkpoint(self, timeout=900):
        until = time.monotonic() + timeout
        while not [*(self.workdir / "checkpoints").glob(f"*/{RECORD}")]:
            assert all(process.poll() is None for process in self.processes), self.said()
            assert time.monotonic() < until, self.said()
            time.sleep(0.1)


@contextlib.contextmanager
def together(workdir, processes, devices, *overrides, own=None):
    """Starts them, each with its `own` words, too; none is left, however a test ends."""
    started = Together(workdir, processes, devices, overrides, own)
    try:
        yield started
    finally:
        for process in started.processes:
            process.kill()
            process.wait()


def losses(workdir):
    return {
        (line["step"], line["split"]): line["loss"]
        for line in read_lines(workdir / "metrics.jsonl")
    }
