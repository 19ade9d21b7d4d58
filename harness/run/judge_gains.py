"""Tier 2 and the hull of one case, from its set-up and what the kernel wrote.

Invariant: adds findings and takes none away; what is looked at follows from the case, never from the output, but for
where the source of an error is looked for.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from harness.cache.build import demanded_lens
from harness.kernel.contract import Contract
from harness.oracle.findings import Findings
from harness.oracle.gains import GainFindings, together
from harness.oracle.hull import judge_hull
from harness.oracle.localise import find_source
from harness.oracle.matched_filter import PageFilter, find_gains
from harness.oracle.transitions import find_stale
from harness.run.setup import Setup
from references.attention import AttentionInputs


def page_filter(contract: Contract, setup: Setup) -> PageFilter:
    case = setup.problem.case
    return PageFilter(
        profile=contract.numerics,
        q_dtype=case.dtype,
        page_size=case.page_size,
        pages=setup.cache.pages,
        cached_lens=demanded_lens(setup.problem, contract.content),
        num_splits=case.num_splits or 1,
        block_descale=setup.cache.kv_block_descale,
    )


def output_values(contract: Contract, setup: Setup) -> torch.Tensor:
    """The output as values, any output scale applied: [num_tokens, num_q_heads, head_size_v], any float dtype."""
    out = setup.outputs[0].tensor
    if contract.numerics.out_scale == 1.0 and out.element_size() > 1:
        return out
    return out.float() * contract.numerics.out_scale


def all_gains(contract: Contract, setup: Setup, inputs: AttentionInputs) -> GainFindings:
    """Tier 2, of pages and of their transitions, `inputs` being what a right kernel sees; none for structured data."""
    if setup.problem.structured:
        return GainFindings()
    out, filters = output_values(contract, setup), page_filter(contract, setup)
    return together(find_gains(inputs, out, filters), find_stale(inputs, out, filters))


def with_gains(findings: Findings, contract: Contract, setup: Setup, inputs: AttentionInputs) -> Findings:
    """`findings` with those of tier 2 and of the hull, `inputs` being what a right kernel sees."""
    out = output_values(contract, setup)
    hull = judge_hull(inputs, out, contract.numerics, setup.problem.case.dtype)
    gains = all_gains(contract, setup, inputs)
    found = replace(findings, gains=gains, hull=hull)
    if found.clean:
        return found
    return replace(found, gains=replace(gains, source=find_source(inputs, out, page_filter(contract, setup), found)))
