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
        env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        self.workdir, self.processes, self._files = workdir, [], []
        for i in range(processes):
            words = [*command, *(own[i] if own else [])]
            if processes > 1:
                words += ["--coordinator", f"127.0.0.1:{port}", f"--processes={processes}"]
                words += ["--process", str(i)]
            self._files.append([workdir.with_name(f"{port}-{i}.{of}") for of in ("out", "err")])
            out, err = (path.open("w") for path in self._files[-1])
            with out, err:
                self.processes.append(subprocess.Popen(words, env=env, stdout=out, stderr=err))

    def said(self):
        """What each has printed so far, and its errors."""
        return [tuple(path.read_text() for path in paths) for paths in self._files]

    def finish(self, timeout=900):
        """Waits for all; the exit codes."""
        until = time.monotonic() + timeout
        return [one.wait(timeout=max(1, until - time.monotonic())) for one in self.processes]

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
