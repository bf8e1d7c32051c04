"""Decides how many steps one program takes, and whether the images stay on the device."""

import jax

from bnjax.data.batches import Examples
from bnjax.data.feed import Feed, host_feed, resident_feed
from bnjax.data.stream import Records
from bnjax.train.build import Experiment
from bnjax.train.cpu import memory

MAX_STEPS = 100  # the largest number of steps in one program on an accelerator
MAX_SECONDS = 0.5  # long compared with the host's work, short enough to respond to Ctrl-C
RESIDENT_SHARE = 0.25  # the fraction of a device's memory that training images may occupy


def default_feed(experiment: Experiment, split: Examples) -> Feed:
    """Returns the fastest feed for the default backend.

    On a CPU a program takes one step, because a program with many steps is ten times slower there
    (jax-ml/jax#12868). An accelerator would wait for the host between steps, so a program takes
    many steps and the training images stay on the device. Records are streamed.
    """
    batch_size, part = experiment.batch_size, experiment.part
    shuffle, room = experiment.shuffle, RESIDENT_SHARE * (memory() or float("inf"))
    on_cpu = jax.default_backend() == "cpu"
    if isinstance(split, Records) or on_cpu or split.image.nbytes > room:
        return host_feed(split, batch_size, shuffle=shuffle, part=part)
    return resident_feed(split, batch_size, shuffle=shuffle, max_steps=MAX_STEPS, part=part)


def dispatch_size(experiment: Experiment, feed: Feed, step: int, step_seconds: float) -> int:
    """Returns the number of steps in the next dispatch, which ends by the next evaluation or save.

    Args:
        experiment: determines the intervals between evaluations and saves.
        feed: determines the largest number of steps in a program.
        step: the number of steps so far.
        step_seconds: the duration of one step in seconds; infinite if not known yet.
    """
    if experiment.stop_at_loss:  # the loss of each step decides whether training continues
        return 1
    ends = (experiment.eval_every, experiment.save_every)
    size = min(feed.max_steps, experiment.steps - step, *(every - step % every for every in ends))
    if jax.process_count() > 1:  # the processes measure different times and would disagree
        return size
    return min(size, max(1, int(MAX_SECONDS / step_seconds)))
