"""Judge: a kernel's outputs against the reference, element by element.

Invariant: an element passes only if |got - want| <= tolerance; NaN, a wrong infinity or an unwritten element never
does. 0/0 is 0: an exact output needs no tolerance. An LSE of -inf must be -inf exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from harness.oracle.findings import Findings, TensorFindings, Worst
from harness.oracle.tolerance import Tolerance
from references.attention import AttentionReference

NOTHING = 1e-300  # a tolerance that only an exact output keeps, without dividing 0 by 0


def judge(
    out: torch.Tensor,
    lse: torch.Tensor | None,
    reference: AttentionReference,
    tolerance: Tolerance,
    *,
    unwritten: Sequence[torch.Tensor] = (),
    violations: Sequence[str] = (),
    exact: bool = False,
) -> Findings:
    """Findings on `out` [num_tokens, num_q_heads, head_size_v] and, where given, `lse` [num_tokens, num_q_heads].

    `unwritten` are bool masks of the shapes of out and lse: elements that still hold what they were handed out with.
    `exact` leaves `out` no tolerance at all: it must be the reference rounded once (needles: one V row, whatever the
    kernel's roundings).
    Everything happens on the device of the outputs; masks move to the CPU only if something mismatches.
    """
    masks: list[torch.Tensor | None] = [*unwritten, None, None]
    want = reference.out
    if tolerance.largest < math.inf:
        want = want.clamp(-tolerance.largest, tolerance.largest)
    allowed = tolerance.out
    if exact:
        want = (want / tolerance.out_scale).to(out.dtype).double() * tolerance.out_scale
        allowed = torch.full_like(want, NOTHING)
    tensors = [_compare("out", out, tolerance.out_scale, want, allowed, masks[0])]
    if lse is not None:
        tensors.append(_compare("lse", lse, tolerance.lse_unit, reference.lse, tolerance.lse, masks[1]))
    return Findings(tuple(tensors), tuple(violations))


def _compare(
    name: str,
    stored: torch.Tensor,
    unit: float,
    want: torch.Tensor,
    allowed: torch.Tensor,
    unwritten: torch.Tensor | None,
) -> TensorFindings:
    """One tensor of any float dtype, times `unit`, against float64 `want` and `allowed` of the same shape."""
    if stored.shape != want.shape:
        raise ValueError(f"{name}: has shape {tuple(stored.shape)}, the reference {tuple(want.shape)}")
    if stored.numel() == 0:
        nothing = torch.zeros(stored.shape, dtype=torch.bool)
        return TensorFindings(name, 0.0, nothing, 0, 0, 0, 0, 0, None)
    error = _signed_error(stored, unit, want).abs_().div_(allowed)
    worst, where = error.flatten().max(0)  # NaN where there is any
    missing = worst.new_zeros(()) if unwritten is None else unwritten.sum()
    place = (x.flatten()[where].double() for x in (stored, want, allowed))
    numbers = torch.stack([worst, where.double(), missing.double(), *place]).tolist()
    counts, mismatched = (0, 0, 0, 0), torch.zeros((), dtype=torch.bool).expand(stored.shape)
    if not numbers[0] <= 1:  # only then can anything be wrong: an infinity or NaN never gives a finite worst
        error, counts = _settled(error, stored, unit, want)
        mismatched = (error > 1).cpu() if counts[0] else mismatched
        where = error.argmax()
        place = (x.flatten()[where].double() for x in (stored, want, allowed))
        numbers = torch.stack([error.max(), where.double(), missing.double(), *place]).tolist()
    err_over_tol, index, num_unwritten, got_there, want_there, allowed_there = numbers
    token, head, dim = _coordinates(int(index), tuple(stored.shape))
    return TensorFindings(
        name=name,
        err_over_tol=err_over_tol,
        mismatched=mismatched,
        num_mismatched=counts[0],
        num_elements=stored.numel(),
        num_nan=counts[1],
        num_inf=counts[2],
        num_unwritten=int(num_unwritten),
        worst=Worst(token, head, dim, got_there * unit, want_there, allowed_there, err_over_tol),
        num_zero=counts[3],
    )


def _signed_error(stored: torch.Tensor, unit: float, want: torch.Tensor) -> torch.Tensor:
    """stored * unit - want, float64"""
    got = stored.to(torch.float64, copy=True)
    return (got if unit == 1.0 else got.mul_(unit)).sub_(want)


def _settled(
    ratio: torch.Tensor, stored: torch.Tensor, unit: float, want: torch.Tensor
) -> tuple[torch.Tensor, tuple[int, int, int, int]]:
    """Error in units of tolerance, 0 where equal (infinities and 0/0 too), inf where anything is not a number.

    And how many elements exceed 1, are NaN, are infinite where the reference is finite, exceed 1 and are 0.
    """
    got = stored.double() * unit
    ratio = ratio.nan_to_num_(nan=math.inf, posinf=math.inf).masked_fill_(got == want, 0.0)
    wrong = ratio > 1
    counts = wrong.sum(), got.isnan().sum(), (got.isinf() & want.isfinite()).sum(), (wrong & (got == 0)).sum()
    bad, nan, inf, zero = torch.stack(counts).tolist()
    return ratio, (bad, nan, inf, zero)


def _coordinates(index: int, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(token, head, dim) of a flat index; dim is -1 for [num_tokens, num_q_heads]."""
    num_dims = shape[2] if len(shape) == 3 else 1
    row, dim = divmod(index, num_dims)
    token, head = divmod(row, shape[1])
    return token, head, dim if len(shape) == 3 else -1
