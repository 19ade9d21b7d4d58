"""The launch of a cache writer, judged: exactly, before attention runs on the memory it left.

Invariant: what a writer has to leave is the cache of class `all` that the attention kernel would else have been handed;
only memory that is that, byte for byte, goes on to attention. What is wrong before is the writer's, not attention's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harness.cache.pool import Pool
from harness.cache.seen_slots import WriteFinding
from harness.cache.written import judge_memory
from harness.dtypes import element_type
from harness.errors import KernelRaised
from harness.kernel.buffer_map import write_buffer_map
from harness.kernel.guarded import GuardedOutput
from harness.kernel.launch import input_tensors, launch
from harness.kernel.registry import code_home, load_entry
from harness.run.outcome import Outcome, Verdict
from harness.run.setup import Setup
from harness.store.plain import plain_dict
from harness.triage.raised import explain_raised
from harness.triage.wording import without_numbers

MAX_TOLD = 6


@dataclass(frozen=True)
class CacheOutput(GuardedOutput):
    """A cache that a writer stores to: all of its memory is compared afterwards. pool: of a boundary probe."""

    pool: Pool | None

    @property
    def surroundings(self) -> torch.Tensor | None:
        return None if self.pool is None else self.pool.elements(self.tensor.dtype)

    def overrun(self) -> str | None:
        return None


def through_writer(setup: Setup, *, program_order_seed: int, buffer_map: Path | None = None) -> Setup | Verdict:
    """Launch the writer of `setup`: the set-up that attention goes on with, or FAIL where the writer is wrong.

    buffer_map: where the addresses of its buffers are written before. Raises KernelNotFound, OutOfMemory and what
    launch lets through.
    """
    writing = setup.writing
    assert writing is not None
    pools = writing.memory.pools_by_argument
    caches = {"k_cache": writing.memory.k, "v_cache": writing.memory.v}
    if buffer_map is not None:
        write_buffer_map(buffer_map, {**input_tensors(writing.args), **caches}, writing.fenced)
    poison = element_type(setup.problem.case.stored_dtype).poison
    try:
        result = launch(
            writing.contract,
            setup.problem.case,
            load_entry(writing.contract),
            writing.args,
            tuple(CacheOutput(name, cache, cache, poison, pools.get(name)) for name, cache in caches.items()),
            program_order_seed=program_order_seed,
            pools={} if writing.probe is None else {"slot_mapping": writing.probe.pool},
        )
    except KernelRaised as error:
        return _failed(setup, explain_raised(error, code_home(writing.contract)))
    memory = judge_memory(setup.problem, setup.cache, writing.memory, writing.tokens, writing.edge)
    if writing.edge is not None:
        writing.edge.wipe(setup.problem, writing.memory)
    if not result.violations and not memory.counts:
        return setup.on_written_memory(result.ran)
    addresses = [] if writing.probe is None else writing.probe.tell(memory.missed, memory.stray_slots)
    return _failed(setup, explain_writing(result.violations, memory.counts, memory.found, addresses), result.ran)


def _failed(setup: Setup, explanation: dict[str, Any], ran: tuple[str, ...] = ()) -> Verdict:
    reason = f"writer {setup.problem.case.writer}: {explanation['summary']}"
    return Verdict(Outcome.FAIL, reason, ran=ran, explanation={**explanation, "summary": reason})


def explain_writing(
    violations: Sequence[str], counts: Sequence[str], found: Sequence[WriteFinding], addresses: Sequence[str] = ()
) -> dict[str, Any]:
    """Explanation of what a writer did wrong; in full as numbers under `writes`. addresses: wrong ones that explain it
    all.
    """
    slots = [str(one) for one in found[:MAX_TOLD]]
    rows = {"address": list(addresses), "violates": list(violations), "wrong": list(counts), "slots": slots}
    first = [*(addresses or slots)[:1], *violations][:2]
    shape = {f"{one.kind} {' '.join(one.which)}" for one in found} | {without_numbers(said) for said in violations}
    return plain_dict(
        {
            "rows": {label: lines for label, lines in rows.items() if lines},
            "summary": "; ".join(first),
            "writes": [vars(one) for one in found],
            "shape": "; ".join(sorted(shape)),
        }
    )
