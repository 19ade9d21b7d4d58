"""The KV cache a kernel is handed: filled, quantised, placed, laid out, poisoned.

Invariant: the cache holds exactly the tokens its content class demands, those on dead pages apart; everything else in
its storage is poison.
The two parameters that break this, `cached_lens` and `poison`, plant set-up faults that harness.cache.verify finds.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from harness.cache.content import Content, is_decode
from harness.cache.descale_buffers import block_descale, tensor_scale, token_descale
from harness.cache.descale_probe import reaching_descales
from harness.cache.layouts import by_slot
from harness.cache.page_pool import allocate_pages
from harness.cache.page_table import PageTable, block_table, kv_indices, table_name
from harness.cache.placement import Placed, place
from harness.cache.poison import poison_bits, poisoned, tail_bits
from harness.cache.pool import Pool, dense_pool
from harness.cache.positions import key_positions, new_token_keys
from harness.cache.probe import Decoy, Live, plant_decoys, reserve
from harness.cache.quantise import bits_of, quantise
from harness.cache.table_probe import entries, reaching_table
from harness.cache.window import dead_columns, dead_pages
from harness.dtypes import element_type
from harness.layout import cache_shape
from harness.problem.boundary import cache_geometry, table_geometry
from harness.problem.problem import Problem


@dataclass(frozen=True)
class KVCache:
    """What is handed over, and what it is meant to hold (see harness.layout for the shapes of k and v)."""

    k: torch.Tensor
    v: torch.Tensor
    block_table: torch.Tensor | None  # [num_seqs, max_pages] int32; None where the pages come as kv_page_indices
    seq_lens: torch.Tensor  # [num_seqs] int32
    query_start_loc: torch.Tensor  # [num_seqs + 1] int32
    k_scale: torch.Tensor  # [1] float32, NaN where descales come by page or token; [num_kv_heads] by head
    v_scale: torch.Tensor
    cached_lens: tuple[int, ...]  # leading tokens of each sequence that were stored
    pages: tuple[tuple[int, ...], ...]  # physical pages of each sequence, in order
    num_pages: int
    page_size: int
    key_payload: torch.Tensor  # [num_keys, num_kv_heads, head_size] in the stored dtype, packed by sequence
    value_payload: torch.Tensor  # [num_keys, num_kv_heads, head_size_v]
    new_k: torch.Tensor | None  # [num_tokens, num_kv_heads, head_size] in the dtype of the case; None for content `all`
    new_v: torch.Tensor | None  # [num_tokens, num_kv_heads, head_size_v]
    kv_block_descale: torch.Tensor | None = None  # [num_pages, num_kv_heads, 2] float32, of K then V
    k_token_descale: torch.Tensor | None = None  # [num_pages, page_size, num_kv_heads] float32
    v_token_descale: torch.Tensor | None = None
    kv_indptr: torch.Tensor | None = None  # [num_seqs + 1] int32, in pages (harness.cache.page_table)
    kv_page_indices: torch.Tensor | None = None  # [total pages, then padding] int32
    kv_last_page_len: torch.Tensor | None = None  # [num_seqs] int32
    # Pools of "k", "v" where they are aliased or a boundary probe says where they lie, as it may of "table" and, by the
    # names of their arguments, of descales.
    pools: Mapping[str, Pool] = field(default_factory=dict)
    dead_pages: frozenset[int] = frozenset()  # that left the window, and hold poison
    decoys: tuple[Decoy, ...] = ()  # what such a probe put where a wrong address would lead

    @property
    def pools_by_argument(self) -> dict[str, Pool]:
        names = {"k": "k_cache", "v": "v_cache", "table": table_name(self)}
        return {names.get(which, which): pool for which, pool in self.pools.items()}

    def pool(self, which: str) -> Pool:
        """The memory of K or V."""
        return self.pools.get(which) or dense_pool(self.k if which == "k" else self.v)


def build_cache(
    problem: Problem,
    content: Content,
    *,
    window_pages: str = "live",
    cached_lens: Sequence[int] | None = None,
    poison: float = math.nan,
) -> KVCache:
    """The cache of `problem` for a kernel of class `content`, on the device of the problem.

    window_pages: "dead" where the kernel must not touch pages that left the sliding window, which are poison then.
    `cached_lens` (default: what `content` demands) and `poison` plant set-up faults. Raises PlacementError, and
    MemoryError where a pool cannot be had.
    """
    case, device = problem.case, problem.q.device
    stored, placed = element_type(case.stored_dtype), place(case)
    if cached_lens is None:
        cached_lens = demanded_lens(problem, content)
    payloads = {
        "k": quantise(problem.k, problem.descale("k"), stored),
        "v": quantise(problem.v, problem.descale("v"), stored),
    }
    dead = dead_pages(dead_columns(case, content, window_pages), placed.pages)
    live = live_tokens(problem, placed.pages, cached_lens, dead)
    alive = [page for pages in placed.pages for page in pages if page not in dead]
    reached = live  # what a probe has memory for: of a writer all tokens, as it stores the others
    if content is Content.WRITTEN:
        reached = live_tokens(problem, placed.pages, demanded_lens(problem, Content.ALL), dead)
    made = {name: _fill(problem, name, payloads[name], placed, alive, live, reached, poison) for name in payloads}
    pools = {name: pool for name, (_, pool, _) in made.items() if pool is not None}
    table = _page_table(problem, placed)
    if reach := table_geometry(case):
        table, pools["table"] = reaching_table(table, reach, entries(case, tuple(cached_lens), device))
    decoys = made["k"][2] + made["v"][2]
    descales = {
        "kv_block_descale": block_descale(problem, placed, dead),
        "k_token_descale": token_descale(problem, "k", placed, live),
        "v_token_descale": token_descale(problem, "v", placed, live),
    }
    if (at := cache_geometry(case)) and "descale" in at.page_strides:
        for name, compact in descales.items():
            if compact is not None:
                far, pools[name], more = reaching_descales(problem, name, compact, at, placed.pages, live)
                descales[name], decoys = far, decoys + more
    query_start = [0]
    for query_len in case.rows.query_lens:
        query_start.append(query_start[-1] + query_len)
    return KVCache(
        k=made["k"][0],
        v=made["v"][0],
        block_table=table.block_table,
        seq_lens=torch.tensor(case.rows.seq_lens, dtype=torch.int32, device=device),
        query_start_loc=torch.tensor(query_start, dtype=torch.int32, device=device),
        k_scale=tensor_scale(problem, "k"),
        v_scale=tensor_scale(problem, "v"),
        cached_lens=tuple(cached_lens),
        pages=placed.pages,
        num_pages=placed.num_pages,
        page_size=case.page_size,
        key_payload=payloads["k"],
        value_payload=payloads["v"],
        new_k=_new_tokens(problem, problem.k, content) if content.takes_new_tokens else None,
        new_v=_new_tokens(problem, problem.v, content) if content.takes_new_tokens else None,
        **descales,
        kv_indptr=table.kv_indptr,
        kv_page_indices=table.kv_page_indices,
        kv_last_page_len=table.kv_last_page_len,
        pools=pools,
        dead_pages=dead,
        decoys=decoys,
    )


def demanded_lens(problem: Problem, content: Content) -> tuple[int, ...]:
    """Leading tokens of each sequence that a kernel of class `content` finds in the cache."""
    rows = problem.case.rows
    return tuple(content.cached_len(q, c) for q, c in zip(rows.query_lens, rows.context_lens, strict=True))


def live_tokens(
    problem: Problem, placed: Sequence[Sequence[int]], cached_lens: Sequence[int], dead: Collection[int]
) -> Live:
    """The first `cached_lens` tokens of each sequence, and where they lie: `placed` are the pages of each.

    Those on `dead` pages are none.
    """
    device, page_size = problem.q.device, problem.case.page_size
    flat_pages = torch.tensor([page for pages in placed for page in pages], dtype=torch.int64, device=device)
    first_page = torch.tensor([len(pages) for pages in placed], device=device)
    first_page = first_page.cumsum(0) - first_page  # [num_seqs]
    keys = key_positions(problem.case.rows, device)
    key = keys.below(cached_lens).nonzero()[:, 0]  # packed keys
    seq, pos = keys.seq[key], keys.pos[key]
    page = flat_pages[first_page[seq] + pos // page_size]
    alive = ~torch.isin(page, torch.tensor(sorted(dead), dtype=torch.int64, device=device))
    return Live(key[alive], page[alive], (pos % page_size)[alive])


def _fill(
    problem: Problem,
    which: str,
    payload: torch.Tensor,
    placed: Placed,
    alive: list[int],
    live: Live,
    reached: Live,
    poison: float,
) -> tuple[torch.Tensor, Pool | None, tuple[Decoy, ...]]:
    """K or V with the `live` tokens of `payload` [num_keys, heads, dim]; its pool, unless dense; a probe's decoys.

    alive: pages that sequences have and may look into, behind their last token as well. reached: tokens whose places,
    right and wrong, a probe has memory for.
    """
    case, device = problem.case, payload.device
    stored, page_size = element_type(case.stored_dtype), case.page_size
    heads, dim = payload.shape[1:]
    shape = cache_shape(case.layout, which, placed.num_pages, page_size, heads, dim, stored.size)
    fill, pool = poison_bits(stored, poison), None
    at = cache_geometry(case)
    if at is None or which not in at.page_strides:
        used = {page for pages in placed.pages for page in pages}
        cache, pool = allocate_pages(case, which, shape, stored, fill, used, device)
    else:
        cache, pool = reserve(problem, which, shape, stored, at, reached, fill & 0xFF)
    slots = by_slot(bits_of(cache), case.layout, which)
    slots.view[torch.tensor(alive, dtype=torch.int64, device=device)] = tail_bits(stored, case.tail, poison)
    slots.store(live.page, live.slot, bits_of(payload)[live.key])
    if at is None or pool is None:
        return cache, pool, ()
    return cache, pool, plant_decoys(problem, which, cache, payload, reached, at.low_bits[which])


def _page_table(problem: Problem, placed: Placed) -> PageTable:
    case, device = problem.case, problem.q.device
    if case.page_table == "block_table":
        return PageTable(block_table(placed, case.table_padding, device))
    return kv_indices(placed, case.rows.seq_lens, case.page_size, case.table_padding, device)


def _new_tokens(problem: Problem, values: torch.Tensor, content: Content) -> torch.Tensor:
    """New tokens out of `values` [num_keys, heads, dim] in the dtype of the case: [num_tokens, heads, dim].

    Poison where a kernel must not look: tokens before the first key, and decode rows that are read from the cache.
    """
    case = problem.case
    key, pos = new_token_keys(case.rows, values.device)
    argument = pos >= 0
    if content is Content.BY_PHASE:
        query_lens = torch.tensor(case.rows.query_lens, device=values.device)
        decode = torch.tensor([is_decode(q) for q in case.rows.query_lens], device=values.device)
        argument &= ~torch.repeat_interleave(decode, query_lens)
    new = poisoned((case.rows.num_tokens, *values.shape[1:]), element_type(case.dtype), values.device)
    new[argument] = values[key[argument]]
    return new
