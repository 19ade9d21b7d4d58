"""The problem of one engine step: a slice of the problem that holds every token of every request.

Invariant: a token has the same q, k and v in every step that sees it, and one descale for as long as its page has one;
so what one step stores is what later steps read.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from harness.problem.admission import pages_needed
from harness.problem.problem import Problem
from harness.problem.schedule import Schedule, Step
from harness.problem.spans import key_start


def step_problem(whole: Problem, schedule: Schedule, step: Step) -> Problem:
    """The batch of `step`; `whole` is the problem of `schedule.problem_case`, whose q has a row for every token."""
    case = schedule.step_case(whole.case, step)
    starts, device = whole.key_start, whole.q.device
    keys = [torch.arange(starts[r.request], starts[r.request] + r.context_len + r.query_len) for r in step.rows]
    queries = [own[row.context_len :] for own, row in zip(keys, step.rows, strict=True)]
    key, query = torch.cat(keys).to(device), torch.cat(queries).to(device)  # [num_keys], [num_tokens]
    return replace(
        whole,
        case=case,
        q=whole.q[query],
        k=whole.k[key],
        v=whole.v[key],
        key_start=key_start(case.rows),
        descales=_descales(whole, step, key),
    )


def _descales(whole: Problem, step: Step, key: torch.Tensor) -> torch.Tensor:
    """Those of the groups that `step` has, [groups, num_kv_heads, 2]; `key` [num_keys] are its keys in `whole`."""
    if whole.case.descales_per == "token":
        return whole.descales[key]
    if whole.case.descales_per != "page":
        return whole.descales
    needed = pages_needed(whole.case)
    first = [sum(needed[:request]) for request in range(len(needed))]
    return torch.cat([whole.descales[first[row.request] :][: len(row.pages)] for row in step.rows])
