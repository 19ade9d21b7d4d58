"""The keys and values that a right kernel sees, for the reference.

Invariant: decided by what the contract demands, not by what was stored: a set-up fault never moves the reference.
"""

from __future__ import annotations

import torch

from harness.cache.build import KVCache, demanded_lens
from harness.cache.content import Content
from harness.cache.positions import key_positions
from harness.cache.quantise import dequantise
from harness.problem.problem import Problem


def effective_kv(problem: Problem, cache: KVCache, content: Content) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 k [num_keys, num_kv_heads, head_size] and v [num_keys, num_kv_heads, head_size_v], packed by sequence.

    Tokens that `content` keeps in the cache are payload * descale (one float32 product); the others are the
    new tokens as they are.
    """
    from_cache = _from_cache(problem, content)

    def seen(payload: torch.Tensor, which: str, new: torch.Tensor) -> torch.Tensor:
        return torch.where(from_cache, dequantise(payload, problem.descale(which)), new.to(torch.float32))

    return seen(cache.key_payload, "k", problem.k), seen(cache.value_payload, "v", problem.v)


def value_weights(problem: Problem, content: Content) -> torch.Tensor:
    """float32 [num_keys, num_kv_heads]: V descale of tokens that `content` keeps in the cache, 1 for new ones."""
    weights = torch.where(_from_cache(problem, content), problem.descale("v"), torch.ones((), device=problem.v.device))
    return weights.expand(*problem.v.shape[:2], 1)[..., 0]


def _from_cache(problem: Problem, content: Content) -> torch.Tensor:
    """bool [num_keys, 1, 1]"""
    keys = key_positions(problem.case.rows, problem.k.device)
    return keys.below(demanded_lens(problem, content))[:, None, None]
