"""The keys and values that a right kernel sees, for the reference.

Invariant: decided by what the contract demands, not by what was stored: a set-up fault never moves the reference.
"""

from __future__ import annotations

import torch

from harness.cache.build import KVCache, demanded_lens
from harness.cache.content import Content
from harness.cache.positions import key_positions
from harness.cache.quantise import dequantise
from harness.dtypes import element_type
from harness.problem.problem import Problem


def effective_kv(
    problem: Problem, cache: KVCache, content: Content, round_to_q: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 k [num_keys, num_kv_heads, head_size] and v [num_keys, num_kv_heads, head_size_v], packed by sequence.

    Tokens that `content` keeps in the cache are payload * scale (one float32 product), rounded to the dtype of the
    case if `round_to_q`; the others are the new tokens as they are.
    """
    keys = key_positions(problem.case.rows, problem.k.device)
    from_cache = keys.below(demanded_lens(problem, content))[:, None, None]  # [num_keys, 1, 1]
    q_type = element_type(problem.case.dtype).torch

    def seen(payload: torch.Tensor, scale: float, new: torch.Tensor) -> torch.Tensor:
        value = dequantise(payload, scale)
        if round_to_q:
            value = value.to(q_type).to(torch.float32)
        return torch.where(from_cache, value, new.to(torch.float32))

    return seen(cache.key_payload, problem.k_scale, problem.k), seen(cache.value_payload, problem.v_scale, problem.v)
