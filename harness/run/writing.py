"""Writing: what a cache writer is handed before attention, as production does.

Invariant: what the writer finds is built and proved like any cache (content class `written`); without a plant, its
arguments satisfy its contract (check_writing proves it each time).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from harness.cache.build import KVCache, build_cache
from harness.cache.content import Content
from harness.cache.slots import NewToken, new_tokens, padded_tokens, slot_mapping
from harness.cache.verify import verify_cache
from harness.errors import SetupBug
from harness.kernel.check_writer import check_writer_arguments
from harness.kernel.guarded import same_bits, strided_copy
from harness.kernel.writer import WriterArguments, WriterContract
from harness.problem.problem import Problem
from harness.run.plant import Plant


@dataclass(frozen=True)
class Writing:
    """What a writer is about to be handed. `memory` holds the context only, until it was launched."""

    contract: WriterContract
    problem: Problem
    memory: KVCache
    args: WriterArguments
    tokens: tuple[NewToken, ...]

    def on_memory(self, k: torch.Tensor, v: torch.Tensor) -> Writing:
        """The same on other memory (see harness.cache.layouts for the shapes), which holds the same."""
        memory, args = replace(self.memory, k=k, v=v), replace(self.args, k_cache=k, v_cache=v)
        return replace(self, memory=memory, args=args)


def build_writing(problem: Problem, contract: WriterContract, plant: Plant) -> Writing:
    """What `contract` is handed for `problem`, on memory that holds the context, with the fault of `plant` in it."""
    case = problem.case
    memory = build_cache(problem, Content.WRITTEN, poison=plant.pool_poison)
    tokens = new_tokens(case.rows, memory.pages, case.page_size)
    k, v = padded_tokens(problem, memory)
    views = strided_copy if case.strides == "all" else lambda tensor: tensor
    args = WriterArguments(
        k=views(k),
        v=views(v),
        slot_mapping=slot_mapping(case.rows, tokens, problem.q.device),
        k_cache=memory.k,
        v_cache=memory.v,
        layout=case.layout,
        k_scale=memory.k_scale,
        v_scale=memory.v_scale,
        kv_dtype=case.kv_dtype,
        kv_block_descale=memory.kv_block_descale,
    )
    return Writing(contract, problem, memory, plant.writer_arguments(args), tokens)


def check_writing(writing: Writing) -> None:
    """Raise SetupBug where the arguments or the memory are not what the writer has to find."""
    problem, memory, args = writing.problem, writing.memory, writing.args
    check_writer_arguments(writing.contract, problem.case, args, writing.tokens)
    k, v = padded_tokens(problem, memory)
    built = {
        "k": k,
        "v": v,
        "k_cache": memory.k,
        "v_cache": memory.v,
        "k_scale": memory.k_scale,
        "v_scale": memory.v_scale,
        "kv_block_descale": memory.kv_block_descale,
    }
    for name, tensor in built.items():
        if not same_bits(getattr(args, name), tensor):
            raise SetupBug(f"{name} of the writer", "the values that were built for this case", "others")
    verify_cache(problem, memory, Content.WRITTEN)
