"""How often keys repeat: equal keys get equal probabilities, whose rounding errors are equal too, not independent.

Invariant: equal keys are always counted together; different ones only if their 64-bit hashes collide.
"""

from __future__ import annotations

import torch


def key_repeats(k: torch.Tensor, seq_lens: tuple[int, ...]) -> torch.Tensor:
    """How often the most repeated key occurs, per sequence and kv head: float64 [num_seqs, num_kv_heads], 0 if empty.

    k: [num_keys, num_kv_heads, head_size], packed by sequence; told apart as float32. The hash of a key is a sum of
    products in integers, which no order of summation changes; a stable sort leaves equal keys side by side.
    """
    num_keys, num_kv_heads, head_size = k.shape
    repeats = k.new_zeros(len(seq_lens), num_kv_heads, dtype=torch.float64)
    if num_keys == 0:
        return repeats
    pairs = torch.nn.functional.pad(k.float(), (0, head_size % 2)) + 0.0  # the sum makes -0 a 0
    bits = pairs.view(torch.int64)  # [num_keys, num_kv_heads, head_size / 2]
    factors = torch.randint(-(1 << 62), 1 << 62, bits.shape[2:], generator=torch.Generator().manual_seed(0)) * 2 + 1
    value, order = bits.mul_(factors.to(k.device)).sum(-1).sort(dim=0, stable=True)  # [num_keys, num_kv_heads]
    sequence = torch.repeat_interleave(torch.tensor(seq_lens, device=k.device), output_size=num_keys)[order]
    place = torch.arange(num_keys, device=k.device)[:, None]
    first = torch.ones_like(sequence, dtype=torch.bool)
    first[1:] = (value[1:] != value[:-1]) | (sequence[1:] != sequence[:-1])
    run = place - torch.where(first, place, 0).cummax(0).values + 1  # length of the run of equal keys up to here
    return repeats.scatter_reduce_(0, sequence, run.double(), "amax")
