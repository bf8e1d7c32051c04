"""Several processes on this machine train together, as on several hosts."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bnjax.train.integrity import RECORD
from bnjax.train.records import read_lines

pytestmark = pytest.mark.slow

CONFIG = Path(__file__).parents[2] / "configs" / "digits.py"


def start(workdir, processes, devices, *overrides):
    """Starts so many processes, each with so many devices."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "bnjax.main", "train", "--config", str(CONFIG)]
    command += ["--workdir", str(workdir), *overrides]
    if processes > 1:
        command += ["--coordinator", f"127.0.0.1:{port}", "--processes", str(processes)]
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    return [
        subprocess.Popen(
            [*command, *(["--process", str(i)] if processes > 1 else [])],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]


def finish(started, timeout=300):
    """The exit codes and all that was printed."""
    ended = [process.communicate(timeout=timeout) for process in started]
    return [process.returncode for process in started], ended


def losses(workdir):
    return {
        (line["step"], line["split"]): line["loss"]
        for line in read_lines(workdir / "metrics.jsonl")
    }


TWO_EPOCHS = ("--config.train.epochs=2.0", "--config.eval.every_epochs=0.5")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone") / "run"
    codes, said = finish(start(workdir, 1, 1, *TWO_EPOCHS))
    assert codes == [0], said
    return losses(workdir)


@pytest.mark.parametrize(("processes", "devices"), [(2, 2), (4, 1)])
def test_what_several_processes_train_is_what_one_trains(tmp_path, alone, processes, devices):
    codes, said = finish(start(tmp_path / "run", processes, devices, *TWO_EPOCHS))
    assert codes == [0] * processes, said
    assert losses(tmp_path / "run") == pytest.approx(alone, rel=2e-2)
    assert "on 4 x cpu" in said[0][0]
    for out, _ in said[1:]:  # Gloo itself says who is connected
        assert all(line.startswith("[Gloo]") for line in out.splitlines())


def wait_for_checkpoint(workdir, started):
    until = time.monotonic() + 400
    while not [*(workdir / "checkpoints").glob(f"*/{RECORD}")]:
        assert time.monotonic() < until
        assert all(process.poll() is None for process in started)
        time.sleep(0.2)


def test_a_killed_process_ends_the_others_and_the_same_command_goes_on(tmp_path, alone):
    workdir = tmp_path / "run"
    started = start(workdir, 2, 1, *TWO_EPOCHS)
    wait_for_checkpoint(workdir, started)
    started[1].kill()
    codes, said = finish(started, timeout=60)
    assert 0 not in codes, said
    codes, said = finish(start(workdir, 2, 1, *TWO_EPOCHS))
    assert codes == [0, 0], said
    assert losses(workdir) == pytest.approx(alone, rel=2e-2)


def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path, alone):
    workdir = tmp_path / "run"
    started = start(workdir, 2, 1, *TWO_EPOCHS)
    wait_for_checkpoint(workdir, started)
    started[1].send_signal(signal.SIGTERM)
    codes, said = finish(started)
    assert codes == [128 + signal.SIGTERM] * 2, said
    codes, said = finish(start(workdir, 2, 1, *TWO_EPOCHS))
    assert codes == [0, 0], said
    assert losses(workdir) == pytest.approx(alone, rel=2e-2)
