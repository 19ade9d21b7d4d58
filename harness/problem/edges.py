"""Targets of law `needle_edges`: keys on both sides of every place where kernels change page, tile or split.

Invariant: every target is a seen key. (Token, head) pairs take turns, in this order, from a start that moves with the
data seed:

    own          the query's own position
    newest       the last seen key; the oldest one: the inner side of the window's edge (of its outer side no needle
    oldest         can be made, as that key is masked: law `probe` points there)
    sinks        the first and the last sink token, where the case has some
    page         first key of the query's page; last key of the page before
    any page     first key of a random page within reach; last key of the page before it
    tile 64      the same for tiles of 64 keys
    tile 128     the same for tiles of 128 keys
    split        the same for the parts of split-KV: num_splits (2 where the case has none) equal parts of the sequence,
                 in whole tiles of 1, 16, 32, 64 or 128 keys

Where no such edge lies within reach, the newest and the oldest seen key stand in.
"""

from __future__ import annotations

import torch

from harness.case import Case
from harness.problem import random
from harness.problem.masks import Seen, to_seen

_SPLIT_TILES = (1, 16, 32, 64, 128)


def edge_targets(case: Case, token: torch.Tensor, pos: torch.Tensor, seen: Seen, seq_len: int) -> torch.Tensor:
    """Target key of every (token, head), int64 [tokens, num_q_heads]; meaningless where nothing is seen.

    `token` (number in the batch), `pos` and what is `seen` are int64 [tokens, 1].
    """
    first, end, sinks = seen
    heads, device = case.num_q_heads, pos.device
    pair = token * heads + torch.arange(heads, device=device)  # [tokens, heads]
    draws = random.integers(case.data_seed, f"edges/{int(token[0, 0])}", (2, *pair.shape), 1 << 40, device)
    page = torch.full_like(pair, case.page_size)

    def beside(step: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both sides of a random multiple of `step` above `first` and below `end`."""
        before = torch.div(first, step, rounding_mode="floor")
        count = torch.div(end - 1, step, rounding_mode="floor") - before  # edges within reach
        edge = (before + 1 + draws[0] % count.clamp(min=1)) * step
        return torch.where(count > 0, edge, end - 1), torch.where(count > 0, edge - 1, first.expand_as(edge))

    own_page = torch.div(pos, case.page_size, rounding_mode="floor") * case.page_size
    kinds = [
        pos, end - 1, first, own_page, own_page - 1,
        *beside(page), *beside(torch.full_like(pair, 64)), *beside(torch.full_like(pair, 128)),
        *beside(_split_len(case, seq_len, draws[1])),
        *([torch.zeros_like(pos), sinks - 1] if case.sink_tokens else []),
    ]  # fmt: skip
    turn = (pair + case.data_seed) % len(kinds)
    target = torch.stack([kind.expand_as(pair) for kind in kinds]).gather(0, turn[None])[0]
    return to_seen(target, seen)


def _split_len(case: Case, seq_len: int, draw: torch.Tensor) -> torch.Tensor:
    """Keys of one split in whole tiles of a drawn size, int64 of the shape of `draw`."""
    splits = case.num_splits or 2
    tiles = [(seq_len + tile - 1) // tile for tile in _SPLIT_TILES]
    lens = [max((n + splits - 1) // splits, 1) * tile for n, tile in zip(tiles, _SPLIT_TILES, strict=True)]
    return torch.tensor(lens, device=draw.device)[draw % len(lens)]
