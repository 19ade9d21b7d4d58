"""A failure told as an exchange of descales: fitted on a sample, and said only if it is borne out by the whole output.

Invariant: a sentence is said only where the reference over descales so exchanged leaves nothing wrong in any tier, and
explains at least MIN_SHARE of what the strongest tier found.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from harness.cache.quantise import dequantise
from harness.dtypes import element_type
from harness.kernel.contract import Contract
from harness.oracle.emulate import emulate
from harness.oracle.findings import Findings
from harness.oracle.gain_findings import Z_LIMIT
from harness.oracle.judge import judge
from harness.oracle.matched_filter import PageFilter
from harness.oracle.stale import Stale
from harness.oracle.stale_fit import Dequantised, best_fit
from harness.oracle.tolerance import tolerance
from harness.run.judge_gains import all_gains, output_values, page_filter
from harness.run.reference import attend_as, reference_inputs
from harness.run.setup import Setup
from harness.triage.place import places
from harness.triage.stale import tell_stale
from references.attention import AttentionInputs

MIN_SHARE = 0.9  # of the squared size of what was found


def explain_stale(setup: Setup, contract: Contract, inputs: AttentionInputs, findings: Findings) -> list[str]:
    """Which descales the output looks like it was made with, in words; [] where no exchange of them explains it."""
    filters = page_filter(contract, setup)
    sequence = _sequence(setup, findings)
    if filters.block_descale is None or sequence is None:
        return []
    out, dequantised = output_values(contract, setup), _dequantised(setup, contract, sequence)
    found = best_fit(inputs, out, filters, sequence, dequantised)
    if found is None:
        return []
    alone = replace(found, sequence=sequence)
    before = _sizes(findings)
    strongest = max(before, key=lambda tier: before[tier])
    for stale in (alone,) if found.slot is not None else (found, alone):
        used = _used(setup, filters, stale)
        after = _sizes(_judged(setup, contract, filters, used))
        share = 1 - (after.get(strongest, 0.0) / before[strongest]) ** 2
        if max(after.values()) <= 1 and share >= MIN_SHARE:
            return tell_stale(setup.problem.case, stale, filters.pages, filters.cached_lens, *_factors(setup, used))
    return []


def _sequence(setup: Setup, findings: Findings) -> int | None:
    """Where most is wrong."""
    for gain in findings.gains.gains:
        if gain.sequence is not None:
            return gain.sequence
    worst = [tensor.worst for tensor in findings.tensors if tensor.num_mismatched and tensor.worst is not None]
    return places(setup.problem.case.rows, [worst[0].token])[0].sequence if worst else None


def _sizes(findings: Findings) -> dict[str, float]:
    """What each tier found, in units of what fails: more than 1 does."""
    sizes = {tensor.name: tensor.err_over_tol for tensor in findings.tensors}
    return sizes | ({"gains": findings.gains.z / Z_LIMIT} if findings.gains.num_statistics else {})


def _dequantised(setup: Setup, contract: Contract, sequence: int) -> Dequantised:
    """K and V of cached keys of one sequence under other descales, rounded as the contract declares."""
    problem, cache, start = setup.problem, setup.cache, setup.problem.key_start[sequence]
    no_query = problem.q[:0].to(element_type(problem.case.dtype).torch)

    def dequantised(keys: torch.Tensor, used: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k = dequantise(cache.key_payload[start + keys], used[..., :1])
        v = dequantise(cache.value_payload[start + keys], used[..., 1:])
        seen = emulate(no_query, k, v, contract.numerics, problem.case.dtype, problem.softmax_scale)
        return seen.k, seen.v

    return dequantised


def _used(setup: Setup, filters: PageFilter, stale: Stale) -> dict[str, torch.Tensor]:
    """By "k", "v", what `stale` has every packed key scaled by: float32 [num_keys, num_kv_heads, 1]."""
    problem = setup.problem
    used = torch.cat([problem.descale("k"), problem.descale("v")], dim=2)  # [num_keys, num_kv_heads, 2]
    assert filters.block_descale is not None
    for sequence, (start, cached_len) in enumerate(zip(problem.key_start, filters.cached_lens, strict=False)):
        if cached_len and stale.sequence in (None, sequence):
            descales = filters.block_descale[list(filters.pages[sequence])]
            used[start : start + cached_len] = stale.used(descales, filters.page_size, cached_len)
    return {"k": used[..., :1], "v": used[..., 1:]}


def _judged(setup: Setup, contract: Contract, filters: PageFilter, used: dict[str, torch.Tensor]) -> Findings:
    """The outputs as they stand, against what a right kernel would make of descales `used`."""
    problem, case = setup.problem, setup.problem.case
    inputs = reference_inputs(problem, setup.cache, contract, used)
    reference = attend_as(inputs, problem, contract)
    allowed = tolerance(reference, contract.numerics, case.dtype, case.head_size, structured=problem.structured)
    out, lse = setup.outputs[0].tensor, setup.outputs[1].tensor if contract.returns_lse else None
    return replace(judge(out, lse, reference, allowed), gains=all_gains(contract, setup, inputs))


def _factors(setup: Setup, used: dict[str, torch.Tensor]) -> tuple[dict[str, tuple[float, float]], int]:
    """By "K", "V", least and largest factor on a descale; and the first packed key that has one."""
    factors = {which: (used[which] / setup.problem.descale(which))[..., 0] for which in "kv"}  # [num_keys, heads]
    spans = {}
    for which, factor in factors.items():
        wrong = factor[factor != 1]
        if wrong.numel():
            spans[which.upper()] = (float(wrong.min()), float(wrong.max()))
    first = int(((factors["k"] != 1) | (factors["v"] != 1)).any(1).nonzero()[0])
    return spans, first
