"""The tolerance a kernel would have if it rounded P one step more finely than it declares.

Invariant: never below the tolerance that a reference computed for that rounding would give, so an error that exceeds
it proves that the declared P dtype shows in the outputs. Made from the moments at hand, without another reference.
"""

from __future__ import annotations

from dataclasses import replace

from harness.kernel.numerics import NumericsProfile, tighter_p
from harness.oracle.tolerance import Tolerance, rounding_of, tolerance
from references.attention import AttentionReference, Rounding


def finer_tolerance(
    reference: AttentionReference, profile: NumericsProfile, q_dtype: str, head_size: int
) -> Tolerance | None:
    """Tolerance under `tighter_p`, or None where there is none or the moments cannot bound it.

    They cannot where weights are folded into P and the finer type has subnormals: flushing then depends on each weight.
    """
    finer = tighter_p(profile, q_dtype)
    if finer is None or (profile.p_fold_v and max(r.half_subnormal for r in _places(rounding_of(finer, q_dtype)))):
        return None
    return tolerance(_bounded(reference, rounding_of(finer, q_dtype)), finer, q_dtype, head_size)


def _bounded(reference: AttentionReference, rounding: Rounding) -> AttentionReference:
    """`reference` with upper bounds of the moments under the finer `rounding`.

    A key that was not flushed has A >= u p, so its A' <= (u' / u) A, plus half a subnormal spacing where A' is that. A
    flushed key has p <= 2 A: it may be a kept one now, and its error u' p is added to what is flushed.
    """
    coarse, fine = _places(reference.rounding), _places(rounding)
    ratio = max(f.unit_roundoff / c.unit_roundoff for c, f in zip(coarse, fine, strict=True))
    unit_roundoff = max(f.unit_roundoff for f in fine)
    subnormal = max(f.half_subnormal for f in fine) * reference.peak * reference.num_visible[:, None]  # per row
    return replace(
        reference,
        cast_square=reference.cast_square * ratio**2,
        cast_sum=reference.abs_pv * unit_roundoff,
        flush_sum=2 * unit_roundoff * reference.flush_sum + (subnormal * reference.max_abs_v)[..., None],
        row_cast_square=reference.row_cast_square * ratio**2,
        row_cast_sum=reference.row_mass * unit_roundoff,
        row_flush_sum=2 * unit_roundoff * reference.row_flush_sum + subnormal,
        rounding=rounding,
    )


def _places(rounding: Rounding) -> tuple[Rounding, Rounding]:
    """For cached and for new keys."""
    return rounding.cached or rounding, rounding
