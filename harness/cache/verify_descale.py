"""Descales by page prove themselves: every one is read back through the page table before a kernel sees it.

Invariant: nothing here uses the builder's views. A page in use and alive has the descales its payload was made with, of
each KV head, K before V; every other float of the storage, stride gaps included, is NaN; and where descales are per
page, nothing else may be multiplied with.
"""

from __future__ import annotations

import math

import torch

from harness.cache.build import KVCache
from harness.cache.page_table import page_ids
from harness.errors import SetupBug
from harness.problem.problem import Problem

NAME = "kv_block_descale"


def verify_block_descale(problem: Problem, cache: KVCache, dead_pages: frozenset[int]) -> None:
    """Raise SetupBug for the first descale in `cache` that its page was not quantised with, or that should be NaN.

    dead_pages: pages that have none although the block table names them.
    """
    want, got = problem.page_descales, cache.kv_block_descale
    if want is None or got is None:
        if want is not got:
            raise SetupBug(NAME, "None" if want is None else "a tensor", "a tensor" if want is None else "None")
        return
    page_size, heads = problem.case.page_size, want.shape[1]
    flat = got.as_strided((got.untyped_storage().nbytes() // got.element_size(),), (1,), 0)
    untouched = torch.ones(len(flat), dtype=torch.bool, device=flat.device)
    head = torch.arange(heads, device=flat.device)[:, None] * got.stride(1)
    inner = head + torch.arange(2, device=flat.device) * got.stride(2)  # [heads, 2]
    logical = 0
    for seq, seq_len in enumerate(problem.case.rows.seq_lens):
        columns = -(-max(seq_len, 0) // page_size)
        page = page_ids(cache, seq, columns).to(torch.int64)  # verified to lie in the pool
        offsets = page[:, None, None] * got.stride(0) + int(got.storage_offset()) + inner  # [columns, heads, 2]
        alive = ~torch.isin(page, torch.tensor(sorted(dead_pages), dtype=torch.int64, device=page.device))
        untouched[offsets[alive]] = False
        wrong = ((flat[offsets] != want[logical : logical + columns]) & alive[:, None, None]).nonzero()
        if len(wrong):
            column, kv_head, kind = wrong[0].tolist()
            found, expected = float(flat[offsets[column, kv_head, kind]]), want[logical + column, kv_head, kind]
            raise SetupBug(
                NAME,
                f"{float(expected):g} for {'KV'[kind]} of kv head {kv_head} in page {int(page[column])} "
                f"(page {column} of sequence {seq})",
                _describe(found, got),
                "every page has the descales its payload was quantised with",
            )
        logical += columns
    stray = (~flat.isnan() & untouched).nonzero()
    if len(stray):
        page_id = (int(stray[0]) - int(got.storage_offset())) // got.stride(0)
        raise SetupBug(
            NAME,
            f"NaN in page {page_id} where no sequence has a descale",
            f"{float(flat[stray[0]]):g}",
            "a finite descale hides that it is read",
        )


def _describe(found: float, block: torch.Tensor) -> str:
    """The value, and whose it is: float32 draws hardly ever coincide."""
    if math.isnan(found):
        return "NaN"
    owners = (block == found).nonzero()
    if not len(owners):
        return f"{found:g}"
    page, kv_head, kind = owners[-1].tolist()
    return f"{found:g}, like {'KV'[kind]} of kv head {kv_head} in page {page}"
