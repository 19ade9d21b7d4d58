"""Writing: what a cache writer is handed before attention, as production does.

Invariant: what the writer finds is built and proved like any cache (content class `written`); without a plant, its
arguments satisfy its contract (check_writing proves it each time).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from harness.cache.build import KVCache, build_cache
from harness.cache.content import Content
from harness.cache.edges import EdgeToken, edge_token, with_more
from harness.cache.slot_probe import SlotProbe, reaching_slots
from harness.cache.slots import NewToken, new_tokens, slot_mapping
from harness.cache.verify import verify_cache
from harness.errors import SetupBug
from harness.kernel.check_writer import check_writer_arguments
from harness.kernel.contract import Contract
from harness.kernel.fences import NO_FENCES, Fences, fence_writer
from harness.kernel.guarded import same_bits, strided_copy
from harness.kernel.writer import WriterArguments, WriterContract
from harness.problem.boundary import slots_geometry
from harness.problem.problem import Problem
from harness.run.plant import Plant


@dataclass(frozen=True)
class Writing:
    """What a writer is about to be handed. `memory` holds the context only, until it was launched."""

    contract: WriterContract
    problem: Problem
    memory: KVCache
    args: WriterArguments
    tokens: tuple[NewToken, ...]  # those that have a slot
    edge: EdgeToken | None  # one of them
    fenced: frozenset[str]  # buffers with nothing mapped around them
    probe: SlotProbe | None = None  # of its slot mapping

    def on_memory(self, k: torch.Tensor, v: torch.Tensor) -> Writing:
        """The same on other memory (see harness.cache.layouts for the shapes), which holds the same."""
        memory, args = replace(self.memory, k=k, v=v), replace(self.args, k_cache=k, v_cache=v)
        return replace(self, memory=memory, args=args)


def build_writing(
    problem: Problem,
    contract: Contract,
    writer: WriterContract,
    full: KVCache,
    plant: Plant,
    fences: Fences = NO_FENCES,
) -> Writing:
    """What `writer` is handed before the kernel of `contract`, on memory that holds the context of `problem`, with the
    fault of `plant` in it. `full` is the same cache built full: it has the descales of all tokens.

    Raises what build_cache and fencing do.
    """
    case = problem.case
    memory = build_cache(problem, Content.WRITTEN, window_pages=contract.window_pages, poison=plant.pool_poison)
    edge = edge_token(problem, memory)
    tokens = new_tokens(case.rows, memory.pages, case.page_size) + (() if edge is None else (edge.token,))
    k, v = handed_tokens(problem, memory, edge)
    views = strided_copy if case.strides == "all" else lambda tensor: tensor
    slots, probe = slot_mapping(case.rows, tokens, problem.q.device), None
    if reach := slots_geometry(case):
        probe = reaching_slots(slots, reach, tokens, case.page_size)
        slots = probe.slots
    args = WriterArguments(
        k=views(k),
        v=views(v),
        slot_mapping=slots,
        k_cache=memory.k,
        v_cache=memory.v,
        layout=case.layout,
        k_scale=memory.k_scale,
        v_scale=memory.v_scale,
        kv_dtype=case.kv_dtype,
        kv_block_descale=full.kv_block_descale,
        k_token_descale=full.k_token_descale,
        v_token_descale=full.v_token_descale,
    )
    fixed = {*memory.pools_by_argument, *(() if probe is None else ("slot_mapping",))}
    args, fenced = fence_writer(fences, args, fixed=fixed, room=contract.room)
    memory = replace(memory, k=args.k_cache, v=args.v_cache)
    return Writing(writer, problem, memory, plant.writer_arguments(args), tokens, edge, fenced, probe)


def handed_tokens(problem: Problem, memory: KVCache, edge: EdgeToken | None) -> tuple[torch.Tensor, torch.Tensor]:
    """New k and v of `memory` with the edge token and padding: [num_tokens + MORE, num_kv_heads, dim]."""
    assert memory.new_k is not None  # memory that a writer finds has its new tokens beside it
    assert memory.new_v is not None
    k, v = (None, None) if edge is None else (edge.k, edge.v)
    return with_more(problem, memory.new_k, k), with_more(problem, memory.new_v, v)


def check_writing(writing: Writing, contract: Contract, full: KVCache) -> None:
    """Raise SetupBug where the arguments or the memory are not what a writer before `contract` has to find.

    full: the same cache built full, and verified.
    """
    problem, memory, args = writing.problem, writing.memory, writing.args
    check_writer_arguments(writing.contract, problem.case, args, writing.tokens)
    k, v = handed_tokens(problem, memory, writing.edge)
    built = {
        "k": k,
        "v": v,
        "k_cache": memory.k,
        "v_cache": memory.v,
        "k_scale": memory.k_scale,
        "v_scale": memory.v_scale,
        "kv_block_descale": full.kv_block_descale,
        "k_token_descale": full.k_token_descale,
        "v_token_descale": full.v_token_descale,
    }
    for name, tensor in built.items():
        if not same_bits(getattr(args, name), tensor):
            raise SetupBug(f"{name} of the writer", "the values that were built for this case", "others")
    verify_cache(problem, memory, Content.WRITTEN, contract.window_pages)
