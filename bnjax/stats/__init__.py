"""The BN clinic: running statistics looked at, recomputed, adapted, folded and ported."""

from bnjax.stats.audit import Findings as Findings
from bnjax.stats.audit import Run as Run
from bnjax.stats.audit import audit as audit
