"""Scope: what a program that serves a sequence and KV head may and must read of one buffer, as the contract has it.

Invariant: decided by the case, the contract and the placement, never by what a kernel did. Places are positions of the
sequence, or pages of it where a buffer has one entry per page.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from harness.access.grid import Grid, Ints, cache_grid
from harness.cache.build import KVCache
from harness.cache.page_table import page_ids
from harness.cache.window import dead_columns
from harness.case import Case
from harness.kernel.arguments import LaunchArguments
from harness.kernel.contract import Contract
from harness.problem.masks import visible_range

Pair = tuple[int, int]  # sequence, KV head
_NOWHERE = -(1 << 40)  # row of a position that has none


class Place(NamedTuple):
    """Where a read that was not to be went: the kind of finding, and whose that memory is."""

    kind: str
    sequence: int | None
    kv_head: int | None
    place: int


@dataclass(frozen=True)
class Rows:
    """Rows of the output: the sequence of each, and the positions that it sees, [first, end) and [0, sinks)."""

    sequence: Ints  # [num_tokens]
    first: Ints  # [num_tokens]
    end: Ints  # [num_tokens]; no more than `first` where nothing is seen
    sinks: Ints  # [num_tokens]

    @classmethod
    def of(cls, case: Case) -> Rows:
        sequence, first, end, sinks = [], [], [], []
        for seq, (query_len, context_len) in enumerate(zip(case.rows.query_lens, case.rows.context_lens, strict=True)):
            query_pos = torch.arange(context_len, context_len + query_len)
            seq_len = context_len + query_len
            seen = visible_range(query_pos, seq_len, case.causal, case.sliding_window, case.sink_tokens)
            sequence.append(np.full(query_len, seq))
            first.append(seen.first.numpy())
            end.append(np.maximum(seen.end.numpy(), seen.first.numpy()))
            sinks.append(seen.sinks.numpy())
        return cls(np.concatenate(sequence), np.concatenate(first), np.concatenate(end), np.concatenate(sinks))


@dataclass(frozen=True)
class Scope:
    """Of one buffer. Ranges are [first, end) of places, by sequence."""

    buffer: str
    grid: Grid
    may: tuple[tuple[int, int], ...]
    must: tuple[tuple[int, int], ...] | None  # of these the places that its rows see; None: nothing has to be read
    tokens_per_place: int  # where something has to be read
    num_kv_heads: int  # 1 where KV heads share what is there
    base: tuple[Ints, ...]  # cell of KV head 0 at each place, by sequence
    paged: bool  # cells are (page, slot, head): see `places_per_page`
    places_per_page: int = 1
    sinks: tuple[int, ...] = ()  # so many leading places may be read as well, by sequence; (): none
    packed: Scope | None = None  # the same of a buffer without gaps at the same address; None where it has none

    def cells(self, pair: Pair, places: Ints) -> Ints:
        """Cells of `places` [n] of one sequence and KV head: [n]"""
        return self.base[pair[0]][places] + (pair[1] if self.num_kv_heads > 1 else 0)

    def allowed(self, pair: Pair) -> Ints:
        first, end = self.may[pair[0]]
        leading = min(self.sinks[pair[0]], first) if self.sinks else 0
        return self.cells(pair, np.concatenate([np.arange(leading), np.arange(first, end)]))

    def page_and_slot(self, cell: int) -> tuple[int | None, int | None]:
        """Physical page and slot of a cell, where it has them."""
        if not self.paged:
            return None, None
        page, slot = divmod(cell // self.num_kv_heads, self.places_per_page)
        return page, slot if self.places_per_page > 1 else None

    def locate(self, cell: int, served: set[Pair]) -> Place:
        """Whose `cell` is, seen from a program that serves `served` and was not to read it."""
        head = cell % self.num_kv_heads if self.num_kv_heads > 1 else None
        at = cell - (head or 0)
        owners = [(seq, int(i)) for seq, cells in enumerate(self.base) for i in np.flatnonzero(cells == at)[:1]]
        owners.sort(key=lambda owner: owner[1])  # an entry of the page table lies behind the rows before its own, too
        own = [(seq, place) for seq, place in owners if any(seq == s for s, _ in served)]
        if not owners:
            return Place("unused_page" if self.paged else "not_handed_over", None, head, cell)
        seq, place = (own or owners)[0]
        if not own:
            kind = "other_sequence"
        elif head is not None and (seq, head) not in served:
            kind = "other_head"
        elif not self.paged:
            kind = "not_handed_over"
        else:
            kind = "behind_end" if place >= self.may[seq][1] else "out_of_window"
        return Place(kind, seq, head, place)


def scopes(case: Case, contract: Contract, cache: KVCache, args: LaunchArguments) -> list[Scope]:
    """The scopes of all buffers that have the shape they were built with and whose elements do not overlap."""
    built = {
        "block_table": cache.block_table,
        "kv_page_indices": cache.kv_page_indices,
        "k_cache": cache.k,
        "v_cache": cache.v,
        "kv_block_descale": cache.kv_block_descale,
        "k_token_descale": cache.k_token_descale,
        "v_token_descale": cache.v_token_descale,
        "k_scale": cache.k_scale,
        "v_scale": cache.v_scale,
        "k": cache.new_k,
        "v": cache.new_v,
    }
    given = {name: getattr(args, name) for name in built}
    lengths = _Lengths.of(case, contract)
    found = []
    for name, tensor in given.items():
        if tensor is None or (as_built := built[name]) is None or tensor.shape != as_built.shape:
            continue
        scope = _scope(name, tensor, case, contract, cache, lengths)
        if scope is not None and not tensor.is_contiguous():
            other = _scope(name, torch.empty_like(tensor, device="meta").contiguous(), case, contract, cache, lengths)
            if other is not None:
                other = replace(other, grid=replace(other.grid, start=scope.grid.start))
            scope = replace(scope, packed=other)
        found += [scope] if scope is not None else []
    return found


def _scope(
    name: str, tensor: torch.Tensor, case: Case, contract: Contract, cache: KVCache, lengths: _Lengths
) -> Scope | None:
    """The scope of the argument `name`, which is `tensor`."""
    if name == "block_table":
        return _table(tensor, contract.over_read(name), lengths)
    if name == "kv_page_indices":
        return _index_list(tensor, contract.over_read(name), cache, lengths)
    if name in ("k_cache", "v_cache"):
        grid = cache_grid(tensor, case.layout, name[0])
        return _of_slots(name, grid, case, cache, contract.over_read(name), lengths)
    if name == "kv_block_descale":
        return _descales(tensor, case, cache, lengths)
    if name in ("k_token_descale", "v_token_descale"):
        grid = Grid.of(tensor, (case.page_size * case.num_kv_heads, case.num_kv_heads, 1), (0, 0, 0))
        return _of_slots(name, grid, case, cache, 0, lengths)
    if name in ("k_scale", "v_scale"):
        return _of_heads(name, tensor, case, lengths)
    return _new_tokens(name, tensor, case, lengths)


@dataclass(frozen=True)
class _Lengths:
    """By sequence."""

    cached: tuple[int, ...]  # leading tokens that the cache holds
    pages: tuple[int, ...]  # that hold them
    alive: tuple[int, ...]  # first position that is not dead, where its page begins
    sinks: tuple[int, ...]  # leading positions before it that are not dead either, up to the end of their page

    @classmethod
    def of(cls, case: Case, contract: Contract) -> _Lengths:
        lens = zip(case.rows.query_lens, case.rows.context_lens, strict=True)
        cached = tuple(contract.content.cached_len(q, c) for q, c in lens)
        pages = tuple(-(-n // case.page_size) for n in cached)
        dead = dead_columns(case, contract.content, contract.window_pages)
        alive = tuple(columns.stop * case.page_size for columns in dead)
        return cls(cached, pages, alive, tuple(columns.start * case.page_size for columns in dead))


def _table(table: torch.Tensor, room: int, lengths: _Lengths) -> Scope | None:
    """Entries of the page table. Cells go on behind the end of a row, so that an over-read is one, wherever it ends."""
    row, entry = table.stride()
    if entry != 1:
        return None
    grid = Grid.linear(table, room)
    width, num_seqs = table.shape[1] if len(table) == 1 else row, len(lengths.pages)
    base = tuple(np.arange(seq * width, min((seq + 2) * width + room, grid.num_cells)) for seq in range(num_seqs))
    may = tuple((0, min(n + room, len(cells))) for n, cells in zip(lengths.pages, base, strict=True))
    return Scope("block_table", grid, may, None, 1, 1, base, paged=True)


def _index_list(table: torch.Tensor, room: int, cache: KVCache, lengths: _Lengths) -> Scope | None:
    """Entries of kv_page_indices. Those of a sequence go on to the end of the list, as an over-read of it does."""
    if table.stride() != (1,):
        return None
    grid = Grid.linear(table, room)
    starts = itertools.accumulate((len(owned) for owned in cache.pages[:-1]), initial=0)
    base = tuple(np.arange(start, grid.num_cells) for start in starts)
    may = tuple((0, min(n + room, len(cells))) for n, cells in zip(lengths.pages, base, strict=True))
    return Scope("kv_page_indices", grid, may, None, 1, 1, base, paged=True)


def _of_slots(name: str, grid: Grid | None, case: Case, cache: KVCache, room: int, lengths: _Lengths) -> Scope | None:
    """Slots of K or V, or of their descales; with `room`, on to that many behind the cached tokens, on pages that the
    table row names.
    """
    if grid is None:
        return None
    base = []
    for seq, (owned, cached) in enumerate(zip(cache.pages, lengths.cached, strict=True)):
        named = page_ids(cache, seq, -(-(cached + room) // case.page_size))[len(owned) :].tolist()
        known = itertools.takewhile(lambda page: 0 <= page < cache.num_pages, named)
        pages = np.array([*owned, *known], dtype=np.int64)[:, None]
        slots = pages * case.page_size + np.arange(case.page_size)  # [pages, page_size]
        base.append(slots.reshape(-1) * case.num_kv_heads)
    ends = zip(lengths.alive, lengths.cached, base, strict=True)
    may = tuple((first, min(n + room, len(cells))) for first, n, cells in ends)
    must = tuple((0, n) for n in lengths.cached)
    return Scope(name, grid, may, must, 1, case.num_kv_heads, tuple(base), True, case.page_size, lengths.sinks)


def _descales(tensor: torch.Tensor, case: Case, cache: KVCache, lengths: _Lengths) -> Scope | None:
    grid = Grid.of(tensor, (case.num_kv_heads, 1, 0), (0, 0, 1))
    if grid is None:
        return None
    base = tuple(np.array(owned, dtype=np.int64) * case.num_kv_heads for owned in cache.pages)
    may = tuple((first // case.page_size, n) for first, n in zip(lengths.alive, lengths.pages, strict=True))
    must = tuple((0, n) for n in lengths.pages)
    sinks = tuple(n // case.page_size for n in lengths.sinks)
    heads = case.num_kv_heads
    return Scope("kv_block_descale", grid, may, must, case.page_size, heads, base, paged=True, sinks=sinks)


def _of_heads(name: str, tensor: torch.Tensor, case: Case, lengths: _Lengths) -> Scope | None:
    """Descales of K or V by KV head: whoever sees a cached token needs that of its head, and a sequence without one may
    read it. None where one is for all.
    """
    grid = Grid.of(tensor, (1,), (0,))
    if case.descales_per != "head" or grid is None:
        return None
    base = tuple(np.zeros(max(n, 1), dtype=np.int64) for n in lengths.cached)
    may, must = tuple((0, max(n, 1)) for n in lengths.cached), tuple((0, n) for n in lengths.cached)
    return Scope(name, grid, may, must, 1, case.num_kv_heads, base, paged=False)


def _new_tokens(name: str, tensor: torch.Tensor, case: Case, lengths: _Lengths) -> Scope | None:
    """Rows of k or v by position of their sequence; positions that have no row stand for no cell."""
    grid = Grid.of(tensor, (case.num_kv_heads, 1, 0), (0, 0, 1))
    if grid is None:
        return None
    base, may, start = [], [], 0
    lens = zip(case.rows.query_lens, case.rows.context_lens, lengths.cached, strict=True)
    for query_len, context_len, cached in lens:
        position = np.arange(max(query_len + context_len, 0))
        row = np.where(position >= context_len, start + position - context_len, _NOWHERE)
        base.append(row * case.num_kv_heads)
        may.append((max(cached, context_len, 0), len(position)))
        start += query_len
    return Scope(name, grid, tuple(may), tuple(may), 1, case.num_kv_heads, tuple(base), paged=False)
