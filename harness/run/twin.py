"""Noise floor: a case's error against that of its own twin, which has one page per sequence and else the same problem.

Invariant: case and twin differ in paging alone (page size, placement and, where descales are per page, descales), each
is measured against its own reference and tolerance, on the same kernel; so what raises the error is paging.

The error of a group (one sequence and KV head, or one KV head of the whole batch) is the root mean square of error
over tolerance: a mean over many elements, where the largest element would be an extreme of noise. The squares of two
such means over n independent errors have an F(n, n) ratio, whose logarithm has a deviation near 2 / sqrt(n): with
MIN_ELEMENTS = 256 of them even at four elements per independent error a factor of 3 (9 in squares) is 8.8 deviations
of ln F, a chance near 1e-15. Honest kernels may sum in another order, which leaves the mean where it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from harness.case import Case, Placement
from harness.kernel.contract import Contract
from harness.kernel.launch import launch
from harness.kernel.registry import Launcher
from harness.oracle.judge import judge
from harness.oracle.tolerance import Tolerance, tolerance
from harness.problem.admission import layout_refusal, placement_refusal
from harness.problem.descales import cache_descales
from harness.problem.problem import Problem
from harness.run.outcome import Outcome, Verdict
from harness.run.reference import build_reference
from harness.run.setup import Setup, build_arguments, check_setup
from harness.triage.explain import with_row
from references.attention import AttentionReference

ELEVATED = 3.0  # times the twin's error
MIN_ELEMENTS = 256  # with an error, in the twin: fewer are no floor (exact outputs have none)
PAGE_STEP = 16  # the twin's page size is a multiple, where the contract leaves the choice


@dataclass(frozen=True)
class NoiseFloor:
    """The group whose error rises most above the twin's."""

    ratio: float
    error: float  # root mean square of error over tolerance
    floor: float  # the same of the twin
    kv_head: int
    sequence: int | None  # None: the whole batch


def with_noise_floor(
    verdict: Verdict,
    contract: Contract,
    setup: Setup,
    reference: AttentionReference,
    allowed: Tolerance,
    launcher: Launcher,
    *,
    fail: bool,
) -> Verdict:
    """`verdict` (a PASS) or, where the error is elevated over the twin's, ELEVATED; FAIL if the matrix asks for it.

    A twin that fails is a failure of the kernel. Structured data have no floor: their errors repeat.
    """
    twin = twin_case(setup.problem.case, contract)
    if isinstance(twin, str) or setup.problem.structured:
        why = twin if isinstance(twin, str) else "errors of structured data repeat"
        return replace(verdict, explanation=with_row(verdict.explanation, "noise floor", f"not measured: {why}"))
    other = build_arguments(twin_problem(setup.problem, twin), contract, fences=setup.fences)
    check_setup(other, contract)
    result = launch(
        contract,
        twin,
        launcher,
        other.args,
        other.outputs,
        program_order_seed=twin.geometry_seed,
        pools=other.cache.pools_by_argument,
    )
    other_reference = build_reference(other.problem, other.cache, contract)
    other_allowed = tolerance(other_reference, contract.numerics, twin.dtype, twin.head_size)
    judged = judge(other.outputs[0].tensor, None, other_reference, other_allowed, violations=result.violations)
    if not judged.clean:
        said = f"its twin with page_size {twin.page_size} fails: {judged.err_over_tol:.3g}x tolerance"
        return replace(verdict, outcome=Outcome.FAIL, reason="; ".join((said, *judged.violations)))
    found = noise_floor(
        setup.problem.case,
        element_errors(setup.outputs[0].tensor, reference, allowed),
        element_errors(other.outputs[0].tensor, other_reference, other_allowed),
    )
    if found is None or found.ratio < ELEVATED:
        return verdict
    where = "all sequences" if found.sequence is None else f"sequence {found.sequence}"
    said = (
        f"error {found.error:.3g} of tolerance is {found.ratio:.1f}x that of the twin with one page per sequence "
        f"({found.floor:.3g}), {where}, kv head {found.kv_head}"
    )
    outcome = Outcome.FAIL if fail else Outcome.ELEVATED
    return replace(verdict, outcome=outcome, reason=said, explanation=with_row(verdict.explanation, "elevated", said))


def twin_case(case: Case, contract: Contract) -> Case | str:
    """`case` with one page per sequence, or why there is none."""
    longest = max(*case.rows.seq_lens, 1)
    if contract.page_sizes is None:
        page_size = -(-longest // PAGE_STEP) * PAGE_STEP
    else:
        page_size = min((size for size in contract.page_sizes if size >= longest), default=0)
    if not page_size:
        return f"no page_size that {contract.name} admits holds {longest} tokens"
    if case.page_size >= longest:
        return "every sequence has one page already"
    shuffled = case.placement if case.placement.kind not in ("explicit", "shared_prefix") else Placement()
    twin = replace(case.without_writer(), page_size=page_size, placement=shuffled, num_pages=None)
    return contract.unsupported(twin) or layout_refusal(twin) or placement_refusal(twin) or twin


def twin_problem(problem: Problem, twin: Case) -> Problem:
    """The same queries, keys and values; descales per page, where there are any, for the pages of the twin."""
    descales = problem.descales
    if twin.descales_per == "page":
        descales = cache_descales(twin, problem.k, problem.v)
    return replace(problem, case=twin, descales=descales, shared_prefix=0)


def element_errors(out: torch.Tensor, reference: AttentionReference, allowed: Tolerance) -> torch.Tensor:
    """Squares of error over tolerance, 0 where nothing is allowed: float64 [num_tokens, num_q_heads, head_size_v]."""
    want = reference.out.clamp(-allowed.largest, allowed.largest)
    return ((out.double() * allowed.out_scale - want) / allowed.out).square_().nan_to_num_(0.0, 0.0, 0.0)


def noise_floor(case: Case, errors: torch.Tensor, floor: torch.Tensor) -> NoiseFloor | None:
    """The largest rise of `errors` over `floor`, both from element_errors; None where no group has a floor."""
    groups = []
    for squares in (errors, floor):
        sums, counts = (_by_group(case, x.double()) for x in (squares, squares > 0))  # [num_seqs + 1, num_kv_heads]
        groups.append((sums, counts))
    (rise, _), (base, active) = groups
    measured = active >= MIN_ELEMENTS
    if not bool(measured.any()):
        return None
    ratio = torch.where(measured, rise / base.clamp(min=1e-300), 0.0)
    sequence, kv_head = divmod(int(ratio.argmax()), case.num_kv_heads)
    tokens = case.rows.num_tokens if sequence == case.rows.num_seqs else case.rows.query_lens[sequence]
    elements = tokens * case.gqa_ratio * case.value_size
    return NoiseFloor(
        ratio=float(ratio.max().sqrt()),
        error=float((rise[sequence, kv_head] / elements).sqrt()),
        floor=float((base[sequence, kv_head] / elements).sqrt()),
        kv_head=kv_head,
        sequence=None if sequence == case.rows.num_seqs else sequence,
    )


def _by_group(case: Case, values: torch.Tensor) -> torch.Tensor:
    """Sums over each sequence and KV head, and over each KV head of the batch: [num_seqs + 1, num_kv_heads]."""
    by_row = values.view(case.rows.num_tokens, case.num_kv_heads, -1).sum(2)  # [num_tokens, num_kv_heads]
    query_lens = torch.tensor(case.rows.query_lens, device=values.device)
    sequence = torch.repeat_interleave(torch.arange(len(query_lens), device=values.device), query_lens)
    sums = by_row.new_zeros(len(query_lens) + 1, case.num_kv_heads).index_add_(0, sequence, by_row)
    sums[-1] = by_row.sum(0)
    return sums
