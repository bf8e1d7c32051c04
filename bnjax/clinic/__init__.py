"""The BN clinic: running statistics looked at, recomputed, adapted, folded and ported."""

from bnjax.clinic.audit import Findings as Findings
from bnjax.clinic.audit import Run as Run
from bnjax.clinic.audit import audit as audit
