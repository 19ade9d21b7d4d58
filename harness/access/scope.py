"""Scope: what a program that serves a sequence and KV head may and must read of one buffer, as the contract has it.

Invariant: decided by the case, the contract and the placement, never by what a kernel did. Places are positions of the
sequence, or pages of it where a buffer has one entry per page.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch

from harness.access.grid import Grid, Ints, cache_grid
from harness.cache.build import KVCache
from harness.case import Case
from harness.kernel.arguments import LaunchArguments
from harness.kernel.contract import Contract
from harness.problem.masks import visible_range

Pair = tuple[int, int]  # sequence, KV head


class Place(NamedTuple):
    """Where a read that was not to be went: the kind of finding, and whose that memory is."""

    kind: str
    sequence: int | None
    kv_head: int | None
    place: int


@dataclass(frozen=True)
class Rows:
    """Rows of the output: the sequence of each, and the positions [first, end) that it sees."""

    sequence: Ints  # [num_tokens]
    first: Ints  # [num_tokens]
    end: Ints  # [num_tokens]; no more than `first` where nothing is seen

    @classmethod
    def of(cls, case: Case) -> Rows:
        sequence, first, end = [], [], []
        for seq, (query_len, context_len) in enumerate(zip(case.rows.query_lens, case.rows.context_lens, strict=True)):
            query_pos = torch.arange(context_len, context_len + query_len)
            seen = visible_range(query_pos, context_len + query_len, case.causal, case.sliding_window)
            sequence.append(np.full(query_len, seq))
            first.append(seen[0].numpy())
            end.append(np.maximum(seen[1].numpy(), seen[0].numpy()))
        return cls(np.concatenate(sequence), np.concatenate(first), np.concatenate(end))


@dataclass(frozen=True)
class Scope:
    """Of one buffer. Ranges are [first, end) of places, by sequence."""

    buffer: str
    grid: Grid
    may: tuple[tuple[int, int], ...]
    must: tuple[tuple[int, int], ...] | None  # of these the places that its rows see; None: nothing has to be read
    tokens_per_place: int
    num_kv_heads: int  # 1 where KV heads share what is there
    base: tuple[Ints, ...]  # cell of KV head 0 at each place, by sequence
    paged: bool  # cells are (page, slot, head): see `places_per_page`
    places_per_page: int = 1

    def cells(self, pair: Pair, places: Ints) -> Ints:
        """Cells of `places` [n] of one sequence and KV head: [n]"""
        return self.base[pair[0]][places] + (pair[1] if self.num_kv_heads > 1 else 0)

    def allowed(self, pair: Pair) -> Ints:
        first, end = self.may[pair[0]]
        return self.cells(pair, np.arange(first, end))

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
    """The scopes of all buffers whose elements do not overlap, in the order in which they are told."""
    rows, page_size = Rows.of(case), case.page_size
    lens = list(zip(case.rows.query_lens, case.rows.context_lens, strict=True))
    cached = [contract.content.cached_len(q, c) for q, c in lens]
    pages = [-(-n // page_size) for n in cached]
    alive = [0] * len(lens)  # first position that is not dead
    if contract.window_pages == "dead":
        oldest = [rows.first[rows.sequence == seq] for seq in range(len(lens))]
        alive = [
            min(int(first.min()) if len(first) else 0, n) // page_size * page_size
            for first, n in zip(oldest, cached, strict=True)
        ]
    found = [_table(case, contract, args, pages)]
    for name, tensor in (("k_cache", args.k_cache), ("v_cache", args.v_cache)):
        grid = cache_grid(tensor, args.layout, name[0])
        room = contract.over_read(name)
        base = [_slots(case, cache, args, seq, cached[seq] + room) for seq in range(len(lens))]
        may = tuple((first, min(n + room, len(b))) for first, n, b in zip(alive, cached, base, strict=True))
        must = tuple((0, n) for n in cached)
        found.append(_scope(name, grid, may, must, 1, case.num_kv_heads, base, paged=True, places_per_page=page_size))
    if args.kv_block_descale is not None:
        heads = case.num_kv_heads
        grid = Grid.of(args.kv_block_descale, (heads, 1, 0), (0, 0, 1))
        base = [np.array(owned, dtype=np.int64) * heads for owned in cache.pages]
        may = tuple((first // page_size, n) for first, n in zip(alive, pages, strict=True))
        must = tuple((0, n) for n in pages)
        found.append(_scope("kv_block_descale", grid, may, must, page_size, heads, base, paged=True))
    starts = list(accumulate(case.rows.query_lens, initial=0))
    for name, new in (("k", args.k), ("v", args.v)):
        if new is None:
            continue
        grid = Grid.of(new, (case.num_kv_heads, 1, 0), (0, 0, 1))
        ends = [max(q + c, 0) for q, c in lens]
        base = [
            _tokens(starts[seq], c, end) * case.num_kv_heads
            for seq, ((_, c), end) in enumerate(zip(lens, ends, strict=True))
        ]
        may = tuple((max(n, c, 0), end) for n, (_, c), end in zip(cached, lens, ends, strict=True))
        found.append(_scope(name, grid, may, may, 1, case.num_kv_heads, base, paged=False))
    return [scope for scope in found if scope is not None]


def _scope(
    name: str,
    grid: Grid | None,
    may: tuple[tuple[int, int], ...],
    must: tuple[tuple[int, int], ...],
    tokens_per_place: int,
    num_kv_heads: int,
    base: list[Ints],
    *,
    paged: bool,
    places_per_page: int = 1,
) -> Scope | None:
    if grid is None:
        return None
    return Scope(name, grid, may, must, tokens_per_place, num_kv_heads, tuple(base), paged, places_per_page)


def _slots(case: Case, cache: KVCache, args: LaunchArguments, seq: int, end: int) -> Ints:
    """Cell of KV head 0 at every slot of the pages of a sequence, and on to `end` on pages that its table row names."""
    owned, page_size = list(cache.pages[seq]), case.page_size
    for page in args.block_table[seq, len(owned) : -(-end // page_size)].tolist():
        if not 0 <= page < cache.num_pages:
            break
        owned.append(page)
    slots = np.array(owned, dtype=np.int64)[:, None] * page_size + np.arange(page_size)  # [pages, page_size]
    return slots.reshape(-1) * case.num_kv_heads


def _tokens(start: int, context_len: int, end: int) -> Ints:
    """Row in k and v of every position below `end` of the sequence whose rows begin at `start`; none before them."""
    position = np.arange(end)
    return np.where(position >= context_len, start + position - context_len, np.iinfo(np.int64).min >> 32)


def _table(case: Case, contract: Contract, args: LaunchArguments, pages: list[int]) -> Scope | None:
    """Entries of the page table. Cells go on behind the end of a row, so that an over-read is one, wherever it ends."""
    row, entry = args.block_table.stride()
    if entry != 1:
        return None
    room = contract.over_read("block_table")
    grid = Grid.linear(args.block_table, room)
    width = args.block_table.shape[1] if len(pages) == 1 else row
    base = tuple(np.arange(seq * width, min((seq + 2) * width + room, grid.num_cells)) for seq in range(len(pages)))
    may = tuple((0, min(n + room, len(cells))) for n, cells in zip(pages, base, strict=True))
    return Scope("block_table", grid, may, None, case.page_size, 1, base, paged=True)
