"""Functions that audit, recompute, adapt, fold and port running statistics."""

from bnjax.clinic.accumulation import accumulated_step as accumulated_step
from bnjax.clinic.adaptation import tent as tent
from bnjax.clinic.checks import audit as audit
from bnjax.clinic.equinox import equinox as equinox
from bnjax.clinic.folding import fold as fold
from bnjax.clinic.freezing import moved as moved
from bnjax.clinic.linen import linen as linen
from bnjax.clinic.measure import Run as Run
from bnjax.clinic.network import Network as Network
from bnjax.clinic.nnx import nnx as nnx
from bnjax.clinic.report import Findings as Findings
from bnjax.clinic.statistics import gap as gap
from bnjax.clinic.statistics import merge_replicas as merge_replicas
from bnjax.clinic.statistics import precise as precise
from bnjax.clinic.watching import assert_healthy as assert_healthy
from bnjax.clinic.watching import vitals as vitals
