"""Descales prove themselves: every one is read back through the page table before a kernel sees it.

Invariant: nothing here uses the builder's views. What is in use and alive, by tensor, head, page or token, has the
descale its payload was made with; every other float of the storage, stride gaps included, is NaN; and no buffer is
there but those of the granularity of the case.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from harness.cache.build import KVCache
from harness.cache.content import Content
from harness.cache.dead import Dead
from harness.cache.page_table import page_ids
from harness.cache.pool import dense_pool
from harness.cache.probe import storage_bits
from harness.cache.table_probe import shared_is_poison
from harness.dtypes import element_type
from harness.errors import SetupBug
from harness.problem.problem import Problem

_BUFFERS = {  # name: granularities that hand it over
    "k_scale": ("tensor", "head", "page", "token"),
    "v_scale": ("tensor", "head", "page", "token"),
    "kv_block_descale": ("page",),
    "k_token_descale": ("token",),
    "v_token_descale": ("token",),
}
_UNREAD = "a finite descale hides that it is read"


@dataclass(frozen=True)
class _Part:
    """Floats of one buffer, by their offset in its storage."""

    offsets: torch.Tensor  # int64, of any shape
    want: torch.Tensor  # float32, of that shape
    whose: Callable[[list[int]], str]  # what the float at an index of these is for


def verify_descales(problem: Problem, cache: KVCache, content: Content, dead_pages: frozenset[int]) -> None:
    """Raise SetupBug for the first descale in `cache` that nothing was quantised with, or that should be NaN.

    dead_pages: pages that have none although the page table names them.
    """
    for name, granularities in _BUFFERS.items():
        tensor, given = getattr(cache, name), problem.case.descales_per in granularities
        if given != (tensor is not None):
            words = {True: "a tensor", False: "None"}
            raise SetupBug(name, words[given], words[not given])
        if tensor is not None:
            _verify(name, tensor, _parts(problem, cache, content, dead_pages, name, tensor), cache)


def _verify(name: str, tensor: torch.Tensor, parts: Iterator[_Part], cache: KVCache) -> None:
    pool = cache.pools.get(name) or dense_pool(tensor)
    bits, dead = storage_bits(tensor), Dead.of(pool, tensor)
    flat = bits.view(torch.float32)
    for part in parts:
        dead.take(part.offsets)
        got = flat[part.offsets]
        wrong = ((got != part.want) & ~(got.isnan() & part.want.isnan())).nonzero()
        if len(wrong):
            index = wrong[0].tolist()
            want = float(part.want[tuple(index)])
            raise SetupBug(
                name,
                f"{_number(want)}{part.whose(index)}",
                _describe(float(got[tuple(index)]), name, tensor),
                _UNREAD if math.isnan(want) else "the descale that the payload was quantised with",
            )
    for decoy in (d for d in cache.decoys if d.which == name):
        dead.take(decoy.offsets)
        if bool((bits[decoy.offsets] != decoy.bits).any()):
            raise SetupBug(name, "the descales that tell a wrong address", "others")
    if not shared_is_poison(pool):
        raise SetupBug(name, "poison in the memory that all unused addresses share", "something else")
    if (stray := dead.stray(bits, element_type("fp32").poison)) is not None:
        page = (stray - int(tensor.storage_offset())) // tensor.stride(0)
        where = f"page {page}" if tensor.dim() == 3 else f"a gap behind kv head {page}"
        raise SetupBug(
            name,
            f"NaN in {where} where no sequence has a descale",
            f"{float(flat[stray]):g}",
            _UNREAD,
        )


def _parts(
    problem: Problem, cache: KVCache, content: Content, dead_pages: frozenset[int], name: str, tensor: torch.Tensor
) -> Iterator[_Part]:
    start, strides = int(tensor.storage_offset()), tensor.stride()
    device, page_size = tensor.device, problem.case.page_size
    if tensor.dim() == 1:
        yield _scales(problem, name, tensor)
        return
    logical, heads = 0, torch.arange(problem.case.num_kv_heads, device=device)
    gone = torch.tensor(sorted(dead_pages), dtype=torch.int64, device=device)
    lens = zip(problem.case.rows.query_lens, problem.case.rows.context_lens, strict=True)
    for seq, (query_len, context_len) in enumerate(lens):
        if name == "kv_block_descale":
            columns = -(-max(query_len + context_len, 0) // page_size)
            page = page_ids(cache, seq, columns).to(torch.int64)  # verified to lie in the pool
            inner = heads[:, None] * strides[1] + torch.arange(2, device=device) * strides[2]  # [heads, 2]
            offsets = start + page[:, None, None] * strides[0] + inner  # [columns, heads, 2]
            want = problem.descales[logical : logical + columns]
            yield _Part(offsets, _unless_dead(want, page, gone), _of_page(seq, page))
            logical += columns
        else:
            pos = torch.arange(content.cached_len(query_len, context_len), device=device)
            page = page_ids(cache, seq, -(-len(pos) // page_size))[pos // page_size].to(torch.int64)
            slot = pos % page_size
            offsets = start + (page * strides[0] + slot * strides[1])[:, None] + heads * strides[2]  # [tokens, heads]
            first = problem.key_start[seq]
            want = problem.descales[first : first + len(pos), :, "kv".index(name[0])]
            yield _Part(offsets, _unless_dead(want, page, gone), _of_token(seq, page, slot))


def _unless_dead(want: torch.Tensor, page: torch.Tensor, gone: torch.Tensor) -> torch.Tensor:
    """`want` [n, ...], NaN where `page` [n] is one of `gone`."""
    dead = torch.isin(page, gone).view(-1, *[1] * (want.dim() - 1))
    return want.masked_fill(dead, math.nan)


def _scales(problem: Problem, name: str, tensor: torch.Tensor) -> _Part:
    """Of `k_scale` or `v_scale`: one for all, one for each head, or a NaN where there is another kind."""
    want = problem.descales[0, :, "kv".index(name[0])]  # [1] or [num_kv_heads]
    if problem.case.descales_per in ("page", "token"):
        want = torch.full_like(want[:1], math.nan)
    offsets = int(tensor.storage_offset()) + torch.arange(len(want), device=want.device) * tensor.stride(0)
    if len(tensor) != len(want):
        raise SetupBug(name, f"{len(want)} descales", f"{len(tensor)}")
    per = problem.case.descales_per
    if per == "head":
        return _Part(offsets, want, lambda at: f" for kv head {at[0]}")
    why = "which the cache was quantised with" if per == "tensor" else f"as descales come by {per}"
    return _Part(offsets, want, lambda at: f", {why}")


def _of_page(seq: int, page: torch.Tensor) -> Callable[[list[int]], str]:
    def words(at: list[int]) -> str:
        column, head, kind = at
        place = f"page {int(page[column])} (page {column} of sequence {seq})"
        return f" for {'KV'[kind]} of kv head {head} in {place}"

    return words


def _of_token(seq: int, page: torch.Tensor, slot: torch.Tensor) -> Callable[[list[int]], str]:
    def words(at: list[int]) -> str:
        pos, head = at
        return f" for kv head {head} of sequence {seq}, position {pos} (page {int(page[pos])}, slot {int(slot[pos])})"

    return words


def _number(value: float) -> str:
    return "NaN" if math.isnan(value) else f"{value:g}"


def _describe(found: float, name: str, tensor: torch.Tensor) -> str:
    """The value, and whose it is: float32 draws hardly ever coincide."""
    owners = (tensor == found).nonzero()
    if not len(owners):
        return _number(found)
    at = owners[-1].tolist()
    if name == "kv_block_descale":
        return f"{found:g}, like {'KV'[at[2]]} of kv head {at[1]} in page {at[0]}"
    if len(at) == 3:
        return f"{found:g}, like kv head {at[2]} of page {at[0]}, slot {at[1]}"
    return f"{found:g}, like kv head {at[0]}" if len(tensor) > 1 else f"{found:g}"
