import functools
import subprocess
import sys

import pytest

from bnjax import errors

CTRL_C = """
import gc, signal, time
from bnjax import errors

def collector(phase, info):
    gc.callbacks.remove(collector)
    signal.raise_signal(signal.SIGINT)

def main():
    if {within}:
        gc.callbacks.append(collector)
        gc.collect()
    else:
        signal.raise_signal(signal.SIGINT)
    time.sleep(600)
    return 0

errors.run(main)
"""


def fail(error):
    raise error


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (errors.ConfigError("seed", -1, "0 and above"), 2, "config.seed = -1"),
        (errors.NonFiniteError("step 3 went bad"), 1, "step 3 went bad"),
        (PermissionError(13, "Denied", "x.npy"), 1, "x.npy cannot be read or written: Denied"),
        (RuntimeError("RESOURCE_EXHAUSTED: 7 bytes"), 1, "--config.train.batch_size"),
        (MemoryError(), 1, "out of memory"),
    ],
)
def test_what_a_user_can_mend_is_one_paragraph(capsys, error, code, said):
    with pytest.raises(SystemExit) as ended:
        errors.run(functools.partial(fail, error))
    assert ended.value.code == code
    text = capsys.readouterr().err
    assert said in text
    assert "Traceback" not in text


@pytest.mark.parametrize("within", [False, True])
def test_ctrl_c_ends_a_command_also_where_nothing_can_be_raised(within):
    command = [sys.executable, "-c", CTRL_C.format(within=within)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 130
    assert done.stderr == "\ninterrupted\n"


def test_what_is_our_own_fault_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="a bug"):
        errors.run(functools.partial(fail, RuntimeError("a bug")))
