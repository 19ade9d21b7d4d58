"""The keys and values that a right kernel sees, for the reference.

Invariant: decided by what the contract demands, not by what was stored: a set-up fault never moves the reference.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from harness.cache.build import KVCache, demanded_lens
from harness.cache.content import Content
from harness.cache.positions import key_positions
from harness.cache.quantise import dequantise
from harness.problem.problem import Problem

Descales = Mapping[str, torch.Tensor]  # by "k", "v": float32 that broadcasts against the packed keys


def effective_kv(
    problem: Problem, cache: KVCache, content: Content, descales: Descales | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 k [num_keys, num_kv_heads, head_size] and v [num_keys, num_kv_heads, head_size_v], packed by sequence.

    Tokens that `content` keeps in the cache are payload * descale (one float32 product); the others are the
    new tokens as they are. `descales` stand in for those of the problem.
    """
    from_cache = _from_cache(problem, content)

    def seen(payload: torch.Tensor, which: str, new: torch.Tensor) -> torch.Tensor:
        descale = problem.descale(which) if descales is None else descales[which]
        return torch.where(from_cache, dequantise(payload, descale), new.to(torch.float32))

    return seen(cache.key_payload, "k", problem.k), seen(cache.value_payload, "v", problem.v)


def value_weights(problem: Problem, content: Content, descales: Descales | None = None) -> torch.Tensor:
    """float32 [num_keys, num_kv_heads]: V descale of tokens that `content` keeps in the cache, 1 for new ones."""
    descale = problem.descale("v") if descales is None else descales["v"]
    weights = torch.where(_from_cache(problem, content), descale, torch.ones((), device=problem.v.device))
    return weights.expand(*problem.v.shape[:2], 1)[..., 0]


def _from_cache(problem: Problem, content: Content) -> torch.Tensor:
    """bool [num_keys, 1, 1]"""
    keys = key_positions(problem.case.rows, problem.k.device)
    return keys.below(demanded_lens(problem, content))[:, None, None]
