"""Setup: everything a kernel is about to be handed, from one case; the only place where these parts meet.

Invariant: without a plant, what is built satisfies the contract of the kernel (check_setup proves it each time).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from harness.cache.build import KVCache, build_cache
from harness.cache.verify import verify_cache
from harness.case import Case
from harness.dtypes import element_type
from harness.errors import SetupBug
from harness.kernel.arguments import LaunchArguments
from harness.kernel.buffer_map import add_to_buffer_map, write_buffer_map
from harness.kernel.check import check_arguments
from harness.kernel.contract import Contract
from harness.kernel.fences import NO_FENCES, Fences, fence_launch
from harness.kernel.guarded import GuardedOutput, guarded_output, same_bits, strided_copy
from harness.kernel.launch import input_tensors
from harness.kernel.reaching import reaching_output
from harness.kernel.workspace import Workspaces
from harness.problem.boundary import output_geometry, workspace_geometry
from harness.problem.problem import Problem
from harness.run.plant import NO_PLANT, Plant
from harness.run.writing import Writing, build_writing, check_writing


@dataclass(frozen=True)
class Setup:
    problem: Problem
    cache: KVCache
    args: LaunchArguments
    outputs: tuple[GuardedOutput, ...]  # out, then lse where the kernel returns one
    writing: Writing | None = None  # the launch of a writer, whose memory the kernel then gets in place of the cache
    wrote: tuple[str, ...] = ()  # device kernels of a writer that was launched
    fences: Fences = NO_FENCES  # what was asked for
    fenced: frozenset[str] = frozenset()  # buffers with nothing mapped around them

    def on_memory(self, k: torch.Tensor, v: torch.Tensor) -> Setup:
        """The same with a writer that stores to the memory `k`, `v`, which holds what its own does."""
        assert self.writing is not None
        return replace(self, writing=self.writing.on_memory(k, v))

    def on_written_memory(self, wrote: tuple[str, ...]) -> Setup:
        """The same after the writer left what it had to, by the device kernels `wrote`: attention reads that memory."""
        assert self.writing is not None
        memory = self.writing.memory
        pools = {**self.cache.pools, **memory.pools}
        cache = replace(self.cache, k=memory.k, v=memory.v, pools=pools, decoys=memory.decoys)
        args = replace(self.args, k_cache=memory.k, v_cache=memory.v)
        return replace(self, cache=cache, args=args, writing=None, wrote=wrote)


def build_arguments(problem: Problem, contract: Contract, plant: Plant = NO_PLANT, fences: Fences = NO_FENCES) -> Setup:
    """Cache, outputs and launch arguments for `problem`, with the set-up fault of `plant` in them.

    Raises what build_cache does, and UsageError for fences that cannot be had here.
    """
    case = problem.case
    cache = build_cache(
        problem,
        contract.content,
        window_pages=contract.window_pages,
        cached_lens=plant.cached_lens(case, contract.content),
        poison=plant.pool_poison,
    )
    outputs = _outputs(problem, contract)
    views = strided_copy if case.strides == "all" else lambda tensor: tensor
    args = LaunchArguments(
        q=views(problem.q),
        k=None if cache.new_k is None else views(cache.new_k),
        v=None if cache.new_v is None else views(cache.new_v),
        k_cache=cache.k,
        v_cache=cache.v,
        layout=case.layout,
        block_table=None if cache.block_table is None else views(with_room(cache, contract, "block_table")),
        query_start_loc=cache.query_start_loc,
        seq_lens=cache.seq_lens,
        max_query_len=max(case.rows.query_lens),
        max_seq_len=max(case.rows.seq_lens),
        k_scale=cache.k_scale,
        v_scale=cache.v_scale,
        kv_dtype=case.kv_dtype,
        softmax_scale=problem.softmax_scale,
        causal=case.causal,
        sliding_window=case.sliding_window or 0,
        logits_soft_cap=case.logits_soft_cap or 0.0,
        alibi_slopes=problem.alibi_slopes,
        sinks=problem.sinks,
        num_splits=case.num_splits or 0,
        out=outputs[0].tensor,
        lse=outputs[1].tensor if contract.returns_lse else None,
        kv_block_descale=cache.kv_block_descale,
        kv_indptr=cache.kv_indptr,
        kv_page_indices=None if cache.kv_page_indices is None else with_room(cache, contract, "kv_page_indices"),
        kv_last_page_len=cache.kv_last_page_len,
        k_token_descale=cache.k_token_descale,
        v_token_descale=cache.v_token_descale,
        q_descale=_scalar(problem, problem.q_descale, case.q_dtype),
        output_scale=_scalar(problem, problem.output_scale, case.out_dtype),
        dtype=element_type(case.dtype).torch,
        allocator=Workspaces(problem.q.device, workspace_geometry(case)),
        sink_tokens=case.sink_tokens,
    )
    writer = contract.writer_of(case)
    writing = None if writer is None else build_writing(problem, contract, writer, cache, plant, fences)
    args, outputs, fenced = fence_launch(
        fences, plant.arguments(args), outputs, fixed=cache.pools_by_argument, room=contract.room
    )
    return Setup(problem, cache, args, outputs, writing, fences=fences, fenced=fenced)


def _scalar(problem: Problem, scale: float, stored: str) -> torch.Tensor | None:
    """float32 [1] for a tensor that is `stored` in 8 bits; None where that is auto."""
    return None if stored == "auto" else torch.tensor([scale], dtype=torch.float32, device=problem.q.device)


def mapped(setup: Setup, path: Path) -> Setup:
    """`setup` with its buffers told in a file, workspaces as the kernel takes them."""
    args, outputs = setup.args, {output.name: output.tensor for output in setup.outputs}
    write_buffer_map(path, {**input_tensors(args), **outputs}, setup.fenced)
    if not isinstance(workspaces := args.allocator, Workspaces):
        return setup

    def prepare(made: GuardedOutput) -> GuardedOutput:
        made = workspaces.prepare(made)
        add_to_buffer_map(path, made.name, made.tensor, fenced=setup.fences.enclose(made))
        return made

    return replace(setup, args=replace(args, allocator=replace(workspaces, prepare=prepare)))


def with_room(cache: KVCache, contract: Contract, name: str) -> torch.Tensor:
    """The page table `name` of `cache`, int32, with the entries behind its last that `contract` says are read: they
    name an unused page; those of a table in a pool are poison.
    """
    table: torch.Tensor = getattr(cache, name)
    if not (entries := contract.over_read(name)) or name in cache.pools_by_argument:
        return table
    used = {page for pages in cache.pages for page in pages}
    dead = next(page for page in reversed(range(cache.num_pages)) if page not in used)
    storage = table.new_full((table.numel() + entries,), dead)
    storage[: table.numel()] = table.flatten()
    return storage[: table.numel()].view(table.shape)


def check_setup(setup: Setup, contract: Contract) -> None:
    """Raise SetupBug where the arguments or the content of the cache violate the contract."""
    check_arguments(contract, setup.problem.case, setup.args)
    check_handover(setup)
    verify_cache(setup.problem, setup.cache, contract.content, contract.window_pages)
    if setup.writing is not None:
        check_writing(setup.writing, contract, setup.cache)


def check_handover(setup: Setup) -> None:
    """Raise SetupBug where an argument is not, bit for bit, what was built and is verified for this case."""
    problem, cache, args = setup.problem, setup.cache, setup.args
    case = problem.case
    scalars = {
        "layout": case.layout,
        "kv_dtype": case.kv_dtype,
        "max_query_len": max(case.rows.query_lens),
        "max_seq_len": max(case.rows.seq_lens),
        "softmax_scale": problem.softmax_scale,
        "causal": case.causal,
        "sliding_window": case.sliding_window or 0,
        "logits_soft_cap": case.logits_soft_cap or 0.0,
        "num_splits": case.num_splits or 0,
        "dtype": element_type(case.dtype).torch,
        "sink_tokens": case.sink_tokens,
    }
    for name, expected in scalars.items():
        if getattr(args, name) != expected:
            raise SetupBug(name, f"{expected!r}, as the case says", repr(getattr(args, name)))
    built = {
        "q": problem.q,
        "k": cache.new_k,
        "v": cache.new_v,
        "k_cache": cache.k,
        "v_cache": cache.v,
        "block_table": cache.block_table,
        "kv_indptr": cache.kv_indptr,
        "kv_page_indices": cache.kv_page_indices,
        "kv_last_page_len": cache.kv_last_page_len,
        "seq_lens": cache.seq_lens,
        "query_start_loc": cache.query_start_loc,
        "k_scale": cache.k_scale,
        "v_scale": cache.v_scale,
        "kv_block_descale": cache.kv_block_descale,
        "k_token_descale": cache.k_token_descale,
        "v_token_descale": cache.v_token_descale,
        "q_descale": _scalar(problem, problem.q_descale, case.q_dtype),
        "output_scale": _scalar(problem, problem.output_scale, case.out_dtype),
        "alibi_slopes": problem.alibi_slopes,
        "sinks": problem.sinks,
    }
    for name, tensor in built.items():
        if not same_bits(getattr(args, name), tensor):
            raise SetupBug(
                name, "the values that were built for this case", "others" if tensor is not None else "a tensor"
            )
    for output in setup.outputs:
        if getattr(args, output.name) is not output.tensor:
            raise SetupBug(output.name, "the guarded output of this case", "another tensor")


def _outputs(problem: Problem, contract: Contract) -> tuple[GuardedOutput, ...]:
    case: Case = problem.case
    tokens, heads = case.rows.num_tokens, case.num_q_heads
    dtype = element_type(contract.numerics.out_type(case.dtype)).torch
    device, strided = problem.q.device, case.strides == "all"
    shape = (tokens, heads, case.value_size)
    reach = output_geometry(case)
    out: GuardedOutput = (
        guarded_output("out", shape, dtype, device, strided)
        if reach is None
        else reaching_output("out", shape, dtype, device, reach.stride, reach.low_bits)
    )
    if not contract.returns_lse:
        return (out,)
    return (out, guarded_output("lse", (tokens, heads), torch.float32, device, strided))
