"""Predicts the time of an all-reduce and of a step with a model based on published speeds."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

from hlo import Reduction


@dataclasses.dataclass(frozen=True)
class Level:
    """Devices, or groups of devices, that are connected by links of one kind.

    Attributes:
        size: the number of devices.
        bandwidth: of each device to the others, in bytes per second and direction.
        hops: the number of sequential hops in the smallest all-reduce.
        latency: of a hop, in seconds.
    """

    size: int
    bandwidth: float
    hops: int
    latency: float


def ring(size: int, bandwidth: float, latency: float) -> Level:
    """Returns a ring: each part goes around it twice."""
    return Level(size, bandwidth, 2 * (size - 1), latency)


def all_reduce_seconds(size: float, levels: Sequence[Level], start: float = 0.0) -> float:
    """Returns the time of an all-reduce, summed over the levels.

    On each level the bytes are scattered among its n devices and gathered again: 2 (n - 1) / n of
    them leave each device; the next level reduces one n-th of the bytes (Patarasuk & Yuan, 2009).

    Args:
        size: bytes of one device.
        levels: the levels, innermost first.
        start: seconds before anything is sent.

    >>> all_reduce_seconds(8.0, [ring(4, 2.0, 0.5)])  # 2 * 3/4 * 8 / 2 + 6 * 0.5
    9.0
    """
    seconds = start
    for level in levels:
        seconds += 2 * (level.size - 1) / level.size * size / level.bandwidth
        seconds += level.hops * level.latency
        size /= level.size
    return seconds


@dataclasses.dataclass(frozen=True)
class Machine:
    """A chip and its links.

    Published: `peak`, FLOP/s by dtype; `memory`, bytes/s; `link` and `network`, bytes/s that a chip
    sends to those in its pod, of `pod` chips, and to others. Assumed: all latencies, of a hop and
    of starting an all-reduce, seconds.
    """

    peak: Mapping[str, float]
    memory: float
    link: float
    network: float
    pod: int
    torus: bool
    hop: float
    far_hop: float
    start: float

    def levels(self, chips: int) -> list[Level]:
        """Returns the levels that connect a number of chips (a power of 2)."""
        inside = min(chips, self.pod)
        rows = 1 << (inside.bit_length() - 1) // 2
        sides = (rows, inside // rows)
        if self.torus:
            # Only a side of 16 is closed to a ring; on an open one half of the links are idle.
            closed = [side == 16 for side in sides]
            one_way = sum(
                side // 2 if is_ring else side - 1
                for side, is_ring in zip(sides, closed, strict=True)
            )
            found = [Level(inside, self.link * (1 if all(closed) else 0.5), 2 * one_way, self.hop)]
        else:
            found = [ring(inside, self.link, self.hop)]
        if chips > inside:
            pods = chips // inside
            trees = 2 * math.ceil(math.log2(pods))
            found.append(Level(pods, self.network, trees, self.far_hop))
        return found


MACHINES = {
    # docs.cloud.google.com/tpu/docs/v5e: 197 TFLOP/s, 819 GB/s, 1,600 Gbit/s between chips, pods of
    # 256 chips with 6.4 Tbit/s to the network.
    "v5e": Machine(
        {"bfloat16": 197e12, "float32": 197e12}, 819e9, 200e9, 3.125e9, 256, True, 1e-6, 25e-6, 2e-6
    ),
    # docs.cloud.google.com/tpu/docs/v6e: 918 TFLOP/s, 1,600 GB/s, 3,200 Gbit/s, 25.6 Tbit/s.
    "v6e": Machine(
        {"bfloat16": 918e12, "float32": 918e12}, 1600e9, 400e9, 12.5e9, 256, True, 1e-6, 25e-6, 2e-6
    ),
    # NVIDIA's data sheets of the H100 SXM and the DGX H100: 989 TFLOP/s (TF32: 494), 3.35 TB/s,
    # NVLink 900 GB/s in both directions together, 8 to a machine with 400 Gbit/s for each.
    "H100": Machine(
        {"bfloat16": 989e12, "float32": 494e12}, 3350e9, 450e9, 50e9, 8, False, 1e-6, 5e-6, 5e-6
    ),
}
BACKWARD = 2 / 3  # of the time of a step on one chip, in which gradients may travel


@dataclasses.dataclass(frozen=True)
class Step:
    """The parts of a step in seconds; `gradients` is the time that computation does not hide."""

    compute: float
    gradients: float
    norms: float

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.compute + self.gradients + self.norms

    @property
    def norm_share(self) -> float:
        """The cost of norms across chips, as a fraction of a step without them."""
        return self.norms / (self.compute + self.gradients)


def compute_seconds(
    machine: Machine, dtype: str, flops: float, accessed: float, use: float
) -> float:
    """Returns the time of computation on one chip: for arithmetic or memory, whichever is longer.

    Args:
        machine: the chip.
        dtype: of the operands.
        flops: of the step, on one chip.
        accessed: bytes of memory that it reads and writes; 0 if not known.
        use: the share of both peaks that is reached.
    """
    return max(flops / machine.peak[dtype], accessed / machine.memory) / use


def step(
    machine: Machine, compute: float, found: Iterable[Reduction], compiled: int, chips: int
) -> Step:
    """Returns the parts of a step on several chips.

    Args:
        machine: the chip and its links.
        compute: the time of computation on one chip.
        found: the all-reduces of the program.
        compiled: for how many chips it is; one over fewer of them stays as large as it is there.
        chips: a power of 2.
    """
    gradients = norms = beside = 0.0
    for one in found if chips > 1 else ():
        size = min(one.devices, chips) if one.use == "moments" and one.devices < compiled else chips
        seconds = all_reduce_seconds(one.bytes, machine.levels(size), machine.start)
        if one.use == "moments":
            norms += seconds
        elif one.overlapped:
            beside += seconds
        else:
            gradients += seconds
    return Step(compute, gradients + max(0.0, beside - BACKWARD * compute), norms)
