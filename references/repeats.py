"""How often keys repeat: equal keys get equal probabilities, whose rounding errors are equal too, not independent.

Invariant: equal keys are always counted together; different ones only if their 64-bit hashes collide.
"""

from __future__ import annotations

import torch


def key_repeats(k: torch.Tensor, seq_lens: tuple[int, ...]) -> torch.Tensor:
    """How often the most repeated key occurs, per sequence and kv head: float64 [num_seqs, num_kv_heads], 0 if empty.

    k: [num_keys, num_kv_heads, head_size], packed by sequence; told apart as float32. The hash of a key is a sum of
    products in integers, which no order of summation changes; one sort leaves equal keys of a place side by side.
    """
    num_keys, num_kv_heads, head_size = k.shape
    repeats = k.new_zeros(len(seq_lens) * num_kv_heads, dtype=torch.float64)
    if num_keys == 0:
        return repeats.view(-1, num_kv_heads)
    pairs = torch.nn.functional.pad(k.float(), (0, head_size % 2)) + 0.0  # the sum makes -0 a 0
    bits = pairs.view(torch.int64)  # [num_keys, num_kv_heads, head_size / 2]
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(1 << 62), 1 << 62, (bits.shape[2] + 1,), generator=generator).to(k.device) * 2 + 1
    head = torch.arange(num_kv_heads, device=k.device)
    sequence = torch.repeat_interleave(torch.tensor(seq_lens, device=k.device), output_size=num_keys)
    place = sequence[:, None] * num_kv_heads + head  # [num_keys, num_kv_heads]
    value = bits.mul_(factors[:-1]).sum(-1).add_(place * factors[-1])  # the same key elsewhere is another one
    value, order = value.flatten().sort()
    first = torch.ones_like(value, dtype=torch.bool)
    first[1:] = value[1:] != value[:-1]
    start = first.nonzero()[:, 0]
    length = torch.diff(start, append=start.new_tensor([len(value)]))
    repeats.scatter_reduce_(0, place.flatten()[order[start]], length.double(), "amax")
    return repeats.view(-1, num_kv_heads)
