"""Faults of kernels, injected through what an honest kernel is handed: it then returns what a faulty kernel would.

Invariant: a fault changes copies; the staged arguments stay right. `needs` are the axes without which there is nothing
to get wrong. A page's descale is changed as such where the kernel takes descales per page; else the page's tokens are
quantised again from the values they were drawn as, times the factor (quantising the payload again would change
nothing: its grid is coarser than the factor).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from staging import Staged

from harness.cache.content import Content
from harness.cache.layouts import Slots, by_slot
from harness.cache.quantise import bits_of, quantise
from harness.dtypes import element_type
from harness.kernel.arguments import LaunchArguments


@dataclass(frozen=True)
class Target:
    """Where a fault is put: a logical page of a sequence and a KV head."""

    seq: int
    page: int
    kv_head: int


Inject = Callable[[Staged, Target], tuple[str, ...]]  # launches with the fault; returns the violations
Change = Callable[[Staged, Target], LaunchArguments]


@dataclass(frozen=True)
class InputFault:
    name: str
    inject: Inject
    needs: Mapping[str, Any] = field(default_factory=dict)  # fields of the case
    content: frozenset[Content] = frozenset(Content)  # kernels it can be injected into


def page_descale(which: str, factor: float) -> Change:
    """The descale of one page and KV head times `factor`; `which` is "k" or "v"."""

    def change(staged: Staged, at: Target) -> LaunchArguments:
        args, cache = staged.setup.args, staged.setup.cache
        page = cache.pages[at.seq][at.page]
        if args.kv_block_descale is not None:
            descale = args.kv_block_descale.clone()  # [pages, kv_heads, 2]
            descale[page, at.kv_head, "kv".index(which)] *= factor
            return replace(args, kv_block_descale=descale)
        problem = staged.problem
        values = (problem.k if which == "k" else problem.v)[_keys_of_page(staged, at)].float()  # [keys, heads, dim]
        values[:, at.kv_head] *= factor
        stored = element_type(staged.case.stored_dtype)
        if staged.case.kv_dtype == "auto":
            values = values.to(stored.torch)
        payload = quantise(values, problem.descale(which)[0], stored)
        pool, slots = _copied(args, which)
        slot = torch.arange(len(payload), device=pool.device)
        slots.store(torch.full_like(slot, page), slot, bits_of(payload))
        return _with(args, which, pool)

    return change


def wrong_page(staged: Staged, at: Target) -> LaunchArguments:
    """The table names the sequence's neighbouring page instead."""
    args, pages = staged.setup.args, staged.setup.cache.pages[at.seq]
    table = args.block_table.clone()
    table[at.seq, at.page] = pages[at.page - 1 if at.page else 1]
    return replace(args, block_table=table)


def stale_slot(staged: Staged, at: Target) -> LaunchArguments:
    """One slot in the middle of the page still holds another token's K and V."""
    return _overwritten(staged, at.seq, at.page * staged.case.page_size + staged.case.page_size // 2, zeros=False)


def newest(zeros: bool) -> Change:
    """The slot of the newest token of the target's sequence holds zeros, or another token."""

    def change(staged: Staged, at: Target) -> LaunchArguments:
        return _overwritten(staged, at.seq, staged.case.rows.seq_lens[at.seq] - 1, zeros)

    return change


def softmax_scale(factor: float) -> Change:
    return lambda staged, at: replace(staged.setup.args, softmax_scale=staged.setup.args.softmax_scale * factor)


def tensor_descale(which: str, factor: float) -> Change:
    """Every descale of K or V times `factor`."""

    def change(staged: Staged, at: Target) -> LaunchArguments:
        args = staged.setup.args
        if args.kv_block_descale is not None:
            descale = args.kv_block_descale.clone()  # [pages, kv_heads, 2]
            descale[..., "kv".index(which)] *= factor
            return replace(args, kv_block_descale=descale)
        return replace(args, **{f"{which}_scale": getattr(args, f"{which}_scale") * factor})

    return change


def descales_dropped(staged: Staged, at: Target) -> LaunchArguments:
    """The K descale is not applied."""
    args = staged.setup.args
    if args.kv_block_descale is None:
        return replace(args, k_scale=torch.ones_like(args.k_scale))
    descale = args.kv_block_descale.clone()  # [pages, kv_heads, 2]
    descale[..., 0] = 1.0
    return replace(args, kv_block_descale=descale)


def window(by: int) -> Change:
    return lambda staged, at: replace(staged.setup.args, sliding_window=staged.setup.args.sliding_window + by)


def heads_reversed(staged: Staged, at: Target) -> LaunchArguments:
    """Queries meet the KV heads in reverse order."""
    args = staged.setup.args
    changed = args
    for which in "kv":
        pool, slots = _copied(args, which)
        slots.view.copy_(slots.view.flip(1 + len(slots.parts)).clone())
        changed = _with(changed, which, pool)
    if args.kv_block_descale is not None:
        changed = replace(changed, kv_block_descale=args.kv_block_descale.flip(1))
    return changed


def length(by: int) -> Change:
    """The kernel is told another length; a slot that it should not reach holds another token, as in a pool in use."""

    def change(staged: Staged, at: Target) -> LaunchArguments:
        seq_len, args = staged.case.rows.seq_lens[at.seq], staged.setup.args
        lens = args.seq_lens.clone()
        lens[at.seq] += by
        if by > 0 and seq_len % staged.case.page_size:  # else the next slot is on no page of the sequence
            args = _overwritten(staged, at.seq, seq_len, zeros=False)
        return replace(args, seq_lens=lens)

    return change


def modifier_off(**values: Any) -> Change:
    return lambda staged, at: replace(staged.setup.args, **values)


def mean_v(staged: Staged, at: Target) -> LaunchArguments:
    return replace(staged.setup.args, q=torch.zeros_like(staged.setup.args.q))


def dims_from(first: int) -> Change:
    """Dimensions of q and k from `first` on are ignored."""

    def change(staged: Staged, at: Target) -> LaunchArguments:
        q = staged.setup.args.q.clone()
        q[..., first:] = 0
        return replace(staged.setup.args, q=q)

    return change


def output_zero(staged: Staged, at: Target) -> tuple[str, ...]:
    for output in staged.setup.outputs:
        output.tensor.zero_()
    return ()


def gqa_modulo(staged: Staged, at: Target) -> tuple[str, ...]:
    """q_head % num_kv_heads instead of q_head // gqa_ratio: queries go in, and results come out, in that order."""
    args, case = staged.setup.args, staged.case
    served = sorted(range(case.num_q_heads), key=lambda head: head % case.num_kv_heads)  # by the KV head that it meets
    order = torch.tensor(served, device=args.q.device)  # place in the kernel -> query head
    slopes, sinks = (None if x is None else x[order] for x in (args.alibi_slopes, args.sinks))
    violations = staged.launch(replace(args, q=args.q[:, order], alibi_slopes=slopes, sinks=sinks))
    for output in staged.setup.outputs:
        output.tensor[:, order] = output.tensor.clone()
    return violations


def causal_shift(staged: Staged, at: Target) -> tuple[str, ...]:
    """Rows see one key of their future: each but the last of its sequence is computed where the next one stands.

    For one sequence: its rows but the last are told to end where the sequence ends.
    """
    _one_sequence(staged)
    violations = staged.launch(staged.setup.args)
    outputs = [output.tensor for output in staged.setup.outputs]
    last = [tensor[-1].clone() for tensor in outputs]
    args = staged.setup.args
    start_loc = args.query_start_loc.clone()
    start_loc[1] -= 1
    views = [tensor[:-1] for tensor in outputs]
    shorter = replace(
        args,
        q=args.q[:-1],
        out=views[0],
        lse=views[1] if len(views) > 1 else None,
        query_start_loc=start_loc,
        max_query_len=args.max_query_len - 1,
    )
    violations += staged.launch(shorter)
    for tensor, row in zip(outputs, last, strict=True):
        tensor[-1] = row
    return violations


def split_weight(staged: Staged, at: Target) -> tuple[str, ...]:
    """Two splits of one sequence are averaged instead of weighted by their sums."""
    _one_sequence(staged)
    args, case = staged.setup.args, staged.case
    (num_pages,) = (len(pages) for pages in staged.setup.cache.pages)
    first = num_pages // 2 * case.page_size  # tokens of the first split, which all rows see whole
    head = replace(args, causal=False, seq_lens=torch.full_like(args.seq_lens, first), max_seq_len=first)
    rest = case.rows.seq_lens[0] - first
    table = args.block_table[:, num_pages // 2 :].contiguous()
    tail = replace(args, seq_lens=torch.full_like(args.seq_lens, rest), max_seq_len=rest, block_table=table)
    violations = staged.launch(head)
    partial = [output.tensor.clone().float() for output in staged.setup.outputs]
    violations += staged.launch(tail)
    for output, other in zip(staged.setup.outputs, partial, strict=True):
        if output.name == "lse":
            output.tensor.copy_(torch.logaddexp(output.tensor.float(), other))
        else:
            output.tensor.copy_((output.tensor.float() + other) / 2)
    return violations


def through(change: Change) -> Inject:
    """One launch on changed arguments."""
    return lambda staged, at: staged.launch(change(staged, at))


NONE = InputFault("none", lambda staged, at: staged.launch(staged.setup.args))
_FP8 = {"kv_dtype": "fp8_e4m3"}
_ALL = frozenset({Content.ALL})

PAGE_FAULTS: tuple[InputFault, ...] = tuple(
    InputFault(f"{which.upper()} descale of one page x{factor:g}", through(page_descale(which, factor)))
    for which in "kv"
    for factor in (1.002, 1.005, 1.017, 1.05)
)
FAULTS: tuple[InputFault, ...] = (
    *PAGE_FAULTS,
    InputFault("wrong page", through(wrong_page)),
    InputFault("stale slot", through(stale_slot)),
    InputFault("newest token: zeros", through(newest(zeros=True))),
    InputFault("newest token: stale", through(newest(zeros=False))),
    InputFault("softmax scale x1.005", through(softmax_scale(1.005))),
    InputFault("softmax scale x1.02", through(softmax_scale(1.02))),
    InputFault("K descale x1.005", through(tensor_descale("k", 1.005)), _FP8),
    InputFault("V descale x1.02", through(tensor_descale("v", 1.02)), _FP8),
    InputFault("K descale dropped", through(descales_dropped), _FP8),
    InputFault("KV heads reversed", through(heads_reversed)),
    InputFault("output zero", output_zero),
    InputFault("mean of V", through(mean_v)),
    InputFault("GQA modulo", gqa_modulo),
    InputFault("causal mask +1", causal_shift, content=_ALL),
    InputFault("window +1", through(window(1)), {"sliding_window": 1000}),
    InputFault("window -1", through(window(-1)), {"sliding_window": 1000}),
    InputFault("splits averaged", split_weight, {"num_splits": 2}, content=_ALL),
    InputFault("sink dropped", through(modifier_off(sinks=None)), {"sinks": True}),
    InputFault("soft cap dropped", through(modifier_off(logits_soft_cap=0.0)), {"logits_soft_cap": 30.0}),
    InputFault("ALiBi dropped", through(modifier_off(alibi_slopes=None)), {"alibi": True}),
    InputFault("dims from 64 on ignored", through(dims_from(64)), {"head_size": 96}),
)


def _keys_of_page(staged: Staged, at: Target) -> slice:
    """Packed positions of the tokens on the page."""
    start, size = staged.problem.key_start, staged.case.page_size
    first = start[at.seq] + at.page * size
    return slice(first, min(first + size, start[at.seq + 1]))


def _copied(args: LaunchArguments, which: str) -> tuple[torch.Tensor, Slots]:
    """A copy of the K or V pool, and its bits by token."""
    pool = (args.k_cache if which == "k" else args.v_cache).clone()
    return pool, by_slot(bits_of(pool), args.layout, which)


def _at(pool: torch.Tensor, page: int, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [1] each."""
    return torch.tensor([page], device=pool.device), torch.tensor([slot], device=pool.device)


def _with(args: LaunchArguments, which: str, pool: torch.Tensor) -> LaunchArguments:
    return replace(args, k_cache=pool) if which == "k" else replace(args, v_cache=pool)


def _overwritten(staged: Staged, seq: int, position: int, zeros: bool) -> LaunchArguments:
    """The slot of a cached token holds zeros, or what the token half a page (or one) before it holds."""
    size, pages = staged.case.page_size, staged.setup.cache.pages[seq]
    other = max(position - max(size // 2, 1), 0)
    changed = staged.setup.args
    for which in "kv":
        pool, slots = _copied(changed, which)
        here, there = (_at(pool, pages[pos // size], pos % size) for pos in (position, other))
        donor = slots.load(*there)  # [1, heads, dim]
        slots.store(*here, torch.zeros_like(donor) if zeros else donor)
        changed = _with(changed, which, pool)
    return changed


def _one_sequence(staged: Staged) -> None:
    if staged.case.rows.num_seqs != 1:
        raise ValueError("this fault is injected into one sequence at a time")
