"""Observability: whether a case could see a fault at all, computed before the launch from the reference alone.

Invariant: a case that cannot see a fault it must see is never reported as PASS; it is BLIND, with the fault, the size
of the fault's effect in units of the tolerance, and the reason.

The effect of a fault is the largest |faulty - right| / tolerance over the sampled outputs and LSEs. An honest kernel
errs by at most one tolerance, so an effect of CERTAIN is sure to be seen; MARGIN asks for more, because a real fault is
seldom exactly its model. Of a fault with a size of its own (`Fault.graded`) no more than CERTAIN is asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from harness.cache.content import Content
from harness.kernel.numerics import NumericsProfile
from harness.oracle.faults import FAULT_MODELS
from harness.oracle.scene import Batch, Outcome, Rows, Scene
from harness.oracle.scene_sampling import scenes
from harness.oracle.tolerance import Tolerance, rounding_of, tolerance
from references.attention import attend

MARGIN = 8.0
CERTAIN = 2.0

Allowed = Callable[[Scene], Tolerance]  # of a scene alone: out [rows, heads, head_size_v], lse [rows, heads]


def wanted(fault: str, margin: float) -> float:
    """The least effect by which `fault` counts as seen where a matrix demands `margin`."""
    return min(margin, CERTAIN) if FAULT_MODELS[fault].graded else margin


@dataclass(frozen=True)
class Effect:
    """What a fault does to a case: `size` in units of the tolerance, None where the case cannot have the fault."""

    fault: str
    size: float | None
    variant: str = ""  # the variant of the fault that shows least, which `size` is of
    because: str = ""  # why the case cannot have the fault

    def seen(self, margin: float) -> bool:
        """Whether the case sees the fault by `margin`, or cannot have it."""
        return self.size is None or self.size >= wanted(self.fault, margin)


@dataclass(frozen=True)
class Blindness:
    """A fault that no output can show, whatever the tolerance."""

    fault: str
    because: str


def observe(
    batch: Batch,
    content: Content,
    allowed: Allowed,
    faults: Sequence[str],
    *,
    with_lse: bool,
    by_filters: Mapping[tuple[str, str], float] | None = None,
) -> tuple[Effect, ...]:
    """The effect of each of `faults` (names of harness.matrix.matrix.FAULTS) on `batch`, in their order.

    `with_lse`: whether the kernel returns an LSE, which sees some faults best. `by_filters`: effects of (fault,
    variant) in units of what a matched filter would flag, which count where they are larger.
    Memory: that of one scene at a time, a few temporaries of MAX_ELEMENTS.
    """
    excuses = {name: FAULT_MODELS[name].excuse(batch.case, content) for name in faults}
    sizes: dict[tuple[str, str], torch.Tensor] = {}
    for scene in scenes(batch):
        view = _Shown(scene, allowed(scene), with_lse)
        for name in faults:
            for label, change in FAULT_MODELS[name].variants.items() if excuses[name] is None else ():
                if (changed := change(scene)) is not None:
                    size = view.effect(changed)
                    sizes[name, label] = torch.maximum(sizes.get((name, label), size), size)
    numbers = dict(zip(sizes, torch.stack(list(sizes.values())).tolist(), strict=True)) if sizes else {}
    numbers |= {at: max(numbers[at], size) for at, size in (by_filters or {}).items() if at in numbers}
    return tuple(_weakest(name, excuses[name], numbers) for name in faults)


def _weakest(name: str, excuse: str | None, sizes: Mapping[tuple[str, str], float]) -> Effect:
    own = {label: size for (fault, label), size in sizes.items() if fault == name}
    if not own:
        return Effect(name, None, because=excuse or "no sequence of the batch can have it")
    label = min(own, key=lambda label: own[label])
    return Effect(name, own[label], label)


class _Shown:
    """A scene and the tolerances of its rows."""

    def __init__(self, scene: Scene, allowed: Tolerance, with_lse: bool) -> None:
        self.scene = scene
        self.out = allowed.out.transpose(0, 1)  # [heads, rows, head_size_v]
        self.lse = allowed.lse.T if with_lse else None  # [heads, rows]
        self.largest = allowed.largest

    def effect(self, changed: Rows | Outcome) -> torch.Tensor:
        """Largest change in units of tolerance: float64 []."""
        faulty, right = changed.outcome() if isinstance(changed, Rows) else changed, self.scene.right
        faulty_out, right_out = (x.out.clamp(-self.largest, self.largest) for x in (faulty, right))
        largest = _ratio(faulty_out, right_out, self.out)
        if self.lse is None or faulty.lse is None or right.lse is None:
            return largest
        return torch.maximum(largest, _ratio(faulty.lse, right.lse, self.lse))


def _ratio(faulty: torch.Tensor, right: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """max |faulty - right| / allowed; 0 where both are the same, infinities too."""
    return torch.where(faulty == right, 0.0, (faulty - right).abs_().div_(allowed)).amax()


def blind_to(
    *, kv_dtype: str, descales: torch.Tensor, law: str, q_descale: float | None, pages: Sequence[Sequence[int]]
) -> tuple[Blindness, ...]:
    """Faults that no output of this set-up can show, whatever the matrix demands.

    `descales` [groups, num_kv_heads or 1, 2] of K then V, drawn by `law`; `q_descale` None where q has none; `pages`
    are the physical pages of each sequence, in order.
    """
    found: list[Blindness] = []
    if kv_dtype != "auto":
        ones = [name for name, own in zip("kv", descales.unbind(2), strict=True) if bool((own == 1).all())]
        for name in ones:
            because = f"the {name.upper()} descale is 1: a kernel that ignores it passes"
            found.append(Blindness(f"{name}_descale", because))
        if not ones and torch.equal(descales[..., 0], descales[..., 1]):
            found.append(Blindness("descales_exchanged", "K and V have the same descales"))
        if law == "equal" and descales[..., 0].numel() > 1:
            found.append(Blindness("descales_mixed_up", "all descales are equal: any other one is right, too"))
    if q_descale == 1:
        found.append(Blindness("q_descale", "the descale of q is 1: a kernel that ignores it passes"))
    in_order = [page for sequence in pages for page in sequence]
    if in_order and in_order == list(range(len(in_order))):
        found.append(
            Blindness(
                "page_mapping", "every page lies where a kernel that ignores the page table looks for it (0, 1, 2, ...)"
            )
        )
    return tuple(found)


def known_tolerance(whole: Tolerance) -> Allowed:
    """That of the whole batch, where it has been computed."""

    def allowed(scene: Scene) -> Tolerance:
        heads = list(scene.q_heads)
        return replace(whole, out=whole.out[scene.tokens][:, heads], lse=whole.lse[scene.tokens][:, heads])

    return allowed


def sampled_tolerance(profile: NumericsProfile, *, structured: bool) -> Allowed:
    """The same without the reference of the whole batch, of which a sample costs a small part.

    It may be larger by a few percent for some rows, as the bound on logits looks at keys hidden from them as well.
    """

    def allowed(scene: Scene) -> Tolerance:
        q_dtype = scene.case.dtype
        reference = attend(scene.alone(), rounding_of(profile, q_dtype), positions=(scene.positions,))
        return tolerance(reference, profile, q_dtype, scene.case.head_size, structured=structured)

    return allowed


def fixed_tolerance(atol: float, rtol: float) -> Allowed:
    """The tolerance of a suite that picks it by hand."""

    def allowed(scene: Scene) -> Tolerance:
        out = scene.right.out.transpose(0, 1)  # [rows, heads, head_size_v]
        return Tolerance(atol + rtol * out.abs(), torch.full(out.shape[:2], math.inf, device=out.device))

    return allowed


def magnitudes(batch: Batch, allowed: Allowed) -> tuple[float, float]:
    """The largest |output| of the sampled rows, and their median tolerance (of medians by scene)."""
    found = [(scene.right.out.abs().amax(), allowed(scene).out.median()) for scene in scenes(batch)]
    outputs, granted = (torch.stack(column) for column in zip(*found, strict=True))
    return float(outputs.amax()), float(granted.median())
