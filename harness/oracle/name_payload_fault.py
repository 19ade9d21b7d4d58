"""Which misreading of stored bytes explains an output that is wrong, if one does.

Invariant: looks only at outputs that failed and never decides whether a case fails; names a fault only where a kernel
with just that fault would have left at most 1 - MIN_SHARE of the squared error over the sampled rows and heads. Faults
of K and V are tried apart and together, as a kernel that gets a format wrong gets both wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from harness.cache.content import Content
from harness.oracle.descale_faults import EVERY_OTHER_SLOT
from harness.oracle.faults import FAULT_MODELS
from harness.oracle.payload_faults import Change
from harness.oracle.scene import Batch, Outcome, Rows, Scene
from harness.oracle.scene_sampling import scenes

MIN_SHARE = 0.98  # of the squared error; roundings of the output and of P remain
_FAULTS = ("scale_dropped", "descale_head", "descale_slot", "encoding", "q_descale", "output_scale")


@dataclass(frozen=True)
class NamedFault:
    fault: str  # a name of harness.matrix.matrix.FAULTS
    variant: str  # "" where there is but one
    share: float  # of the squared error that it explains


def name_payload_fault(batch: Batch, content: Content, out: torch.Tensor, largest: float) -> NamedFault | None:
    """The fault that explains `out` [num_tokens, num_q_heads, head_size_v], values that saturate at `largest`.

    Elements of `out` that are not finite are left aside.
    """
    faults = [fault for fault in _FAULTS if FAULT_MODELS[fault].excuse(batch.case, content) is None]
    errors: dict[tuple[str, str], float] = {}
    whole = 0.0
    for scene in scenes(batch) if faults else ():
        got = out[scene.tokens][:, list(scene.q_heads)].transpose(0, 1).double()  # [heads, rows, head_size_v]
        whole += _squared(got, scene.right, largest)
        for fault in faults:
            for variant, outcome in _outcomes(scene, fault):
                error = _squared(got, outcome, largest)
                errors[fault, variant] = errors.get((fault, variant), 0.0) + error
    if not errors or whole == 0.0:
        return None
    fault, variant = min(errors, key=lambda key: errors[key])
    share = 1 - errors[fault, variant] / whole
    return NamedFault(fault, variant, share) if share >= MIN_SHARE else None


def _outcomes(scene: Scene, fault: str) -> Iterator[tuple[str, Outcome]]:
    """What a kernel with each variant of `fault` would return; the right outcome where the scene cannot have it."""
    variants: Mapping[str, Change] = FAULT_MODELS[fault].variants if fault != "descale_slot" else EVERY_OTHER_SLOT
    found = {label: change(scene) for label, change in variants.items()}
    for label, changed in found.items():
        yield label, _outcome(scene, changed)
        partner = found.get(label.replace("K", "V", 1)) if "K" in label else None
        if isinstance(changed, Rows) and isinstance(partner, Rows):
            yield label.replace("K", "K and V", 1), replace(changed, v=partner.v).outcome()


def _outcome(scene: Scene, changed: Rows | Outcome | None) -> Outcome:
    if changed is None:
        return scene.right
    return changed.outcome() if isinstance(changed, Rows) else changed


def _squared(got: torch.Tensor, outcome: Outcome, largest: float) -> float:
    difference = (got - outcome.out.clamp(-largest, largest)).masked_fill_(~got.isfinite(), 0.0)
    return float(difference.square_().sum())
