"""Several processes on this machine train together, as on several hosts."""

import signal

import pytest
from processes import losses, together

pytestmark = pytest.mark.slow

TWO_EPOCHS = ("--config.train.epochs=2.0", "--config.eval.every_epochs=0.5")
# A signal comes once the first checkpoint is there, long before the last step.
LONG = ("--config.train.epochs=16.0", "--config.eval.every_epochs=4.0")
SAVING = ("--config.checkpoint.every_steps=15",)


def train(workdir, processes, devices, *overrides):
    """All that was printed by a training that goes through."""
    with together(workdir, processes, devices, *overrides) as started:
        assert started.finish() == [0] * processes, started.said()
        return started.said()


def agree(mine, its):
    """The order in which devices are summed up rounds differently, which grows from step to step.

    So each loss of the first epochs is compared, and those of tests later on.
    """
    assert mine.keys() == its.keys()
    early = [key for key in its if key[0] <= 25]
    assert [mine[key] for key in early] == pytest.approx([its[key] for key in early], rel=2e-2)
    late = [key for key in its if key[1] == "test"]
    assert [mine[key] for key in late] == pytest.approx([its[key] for key in late], abs=5e-2)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone") / "run"
    train(workdir, 1, 1, *LONG, *SAVING)
    return losses(workdir)


@pytest.mark.parametrize(("processes", "devices"), [(2, 2), (4, 1)])
def test_what_several_processes_train_is_what_one_trains(tmp_path, processes, devices):
    train(tmp_path / "alone", 1, 1, *TWO_EPOCHS)
    (first, *_), *others = train(tmp_path / "run", processes, devices, *TWO_EPOCHS)
    agree(losses(tmp_path / "run"), losses(tmp_path / "alone"))
    assert "on 4 x cpu" in first
    for out, _ in others:  # Gloo itself says who is connected
        assert all(line.startswith("[Gloo]") for line in out.splitlines())


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_is_killed_or_stopped_ends_all_and_the_same_command_goes_on(
    tmp_path, alone, sent
):
    workdir = tmp_path / "run"
    with together(workdir, 2, 1, *LONG, *SAVING) as started:
        started.wait_for_checkpoint()
        started.processes[1].send_signal(sent)
        codes = started.finish(timeout=120)
        assert 0 not in codes, started.said()
        assert sent == signal.SIGKILL or codes == [128 + sent] * 2, started.said()
    assert max(step for step, _ in losses(workdir)) < max(step for step, _ in alone)
    train(workdir, 2, 1, *LONG, *SAVING)
    agree(losses(workdir), alone)
