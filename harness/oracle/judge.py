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
    want = reference.out.clamp(-tolerance.largest, tolerance.largest)
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
    got = stored.double() * unit
    ratio = _ratio(got, want, allowed)
    bad = ratio > 1
    worst = ratio.argmax()
    numbers = (
        ratio.max(),
        worst,
        bad.sum(),
        got.isnan().sum(),
        (got.isinf() & want.isfinite()).sum(),
        unwritten.sum() if unwritten is not None else bad.new_zeros(()),
        *(x.flatten()[worst] for x in (got, want, allowed)),
    )
    err_over_tol, where, *counts, got_there, want_there, allowed_there = torch.stack(
        [x.double() for x in numbers]
    ).tolist()
    num_bad, num_nan, num_inf, num_unwritten = map(int, counts)
    token, head, dim = _coordinates(int(where), tuple(stored.shape))
    return TensorFindings(
        name=name,
        err_over_tol=err_over_tol,
        mismatched=bad.cpu() if num_bad else torch.zeros((), dtype=torch.bool).expand(stored.shape),
        num_mismatched=num_bad,
        num_elements=stored.numel(),
        num_nan=num_nan,
        num_inf=num_inf,
        num_unwritten=num_unwritten,
        worst=Worst(token, head, dim, got_there, want_there, allowed_there, err_over_tol),
    )


def _ratio(got: torch.Tensor, want: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Error in units of tolerance: 0 where equal (infinities too), inf where anything is not a number."""
    error = (got - want).abs_()
    error.div_(allowed).nan_to_num_(nan=math.inf, posinf=math.inf)  # equal infinities and 0/0 are settled next
    return error.masked_fill_(got == want, 0.0)


def _coordinates(index: int, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(token, head, dim) of a flat index; dim is -1 for [num_tokens, num_q_heads]."""
    num_dims = shape[2] if len(shape) == 3 else 1
    row, dim = divmod(index, num_dims)
    token, head = divmod(row, shape[1])
    return token, head, dim if len(shape) == 3 else -1
