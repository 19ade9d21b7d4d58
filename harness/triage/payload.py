"""A fault of what stored bytes mean, in one line. Invariant: words only; what explains the output is already known."""

from __future__ import annotations

from harness.matrix.matrix import FAULTS
from harness.oracle.name_payload_fault import NamedFault


def tell_payload_fault(named: NamedFault) -> str:
    variant = f" ({named.variant})" if named.variant else ""
    return f"{FAULTS[named.fault]}{variant}: {100 * named.share:.1f} % of the squared error"
