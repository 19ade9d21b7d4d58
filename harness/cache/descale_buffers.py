"""Descale buffers: the tensors in which a kernel is handed the descales of the pages, heads or tokens of a cache.

Invariant: whatever no live token is quantised with is NaN: descales of unused and dead pages, of slots without a token,
gaps of strided views, and the descales per tensor where there is another kind. Strided views differ in their gaps and
in the order of their strides, so that none follows from a shape.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from harness.cache.placement import Placed
from harness.cache.poison import poisoned
from harness.cache.probe import Live
from harness.dtypes import element_type
from harness.problem.problem import Problem


def tensor_scale(problem: Problem, which: str) -> torch.Tensor:
    """`k_scale` or `v_scale` (`which` "k", "v"): float32 [1], NaN where descales come by page or token; [num_kv_heads]
    where they come by head.
    """
    case, own = problem.case, problem.descales[..., "kv".index(which)]
    if case.descales_per in ("page", "token"):
        return _nan(1, device=own.device)
    if case.descales_per == "tensor" or case.strides == "compact":
        return own[0].clone()
    strided = _nan(own.shape[1], {"k": 3, "v": 2}[which], device=own.device)[:, 0]
    return strided.copy_(own[0])


def block_descale(problem: Problem, placed: Placed, dead: Collection[int]) -> torch.Tensor | None:
    """`kv_block_descale`, by physical page: float32 [num_pages, num_kv_heads, 2], of K then V; NaN for `dead` ones."""
    if problem.case.descales_per != "page":
        return None
    scales, gap = problem.descales, int(problem.case.strides != "compact")
    block = _nan(placed.num_pages, scales.shape[1] + gap, 2 + 3 * gap, device=scales.device)[:, : scales.shape[1], :2]
    block[[page for pages in placed.pages for page in pages]] = scales
    block[sorted(dead)] = _nan(1, device=scales.device)
    return block


def token_descale(problem: Problem, which: str, placed: Placed, live: Live) -> torch.Tensor | None:
    """`k_token_descale` or `v_token_descale`: float32 [num_pages, page_size, num_kv_heads].

    Strided, that of K lies head by head, as kernels that scale a whole row of scores like it.
    """
    case, heads = problem.case, problem.descales.shape[1]
    if case.descales_per != "token":
        return None
    pages, slots = placed.num_pages, case.page_size
    if case.strides == "compact":
        buffer = _nan(pages, slots, heads, device=problem.descales.device)
    elif which == "k":
        buffer = _nan(pages, heads + 1, slots + 2, device=problem.descales.device)[:, :heads, :slots].transpose(1, 2)
    else:
        buffer = _nan(pages, slots + 1, heads + 3, device=problem.descales.device)[:, :slots, :heads]
    buffer[live.page, live.slot] = problem.descales[live.key, :, "kv".index(which)]
    return buffer


def _nan(*shape: int, device: torch.device) -> torch.Tensor:
    return poisoned(shape, element_type("fp32"), device)
