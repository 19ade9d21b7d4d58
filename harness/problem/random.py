"""Counter-based random numbers, the same bits on every device.

Invariant: element i of a stream is a function of (seed, stream name, i) alone, made of integer operations and one table
lookup, so neither device, nor chunking, nor the order of calls changes a bit. No generator state exists.

The hash is the finaliser of SplitMix64 (Steele, Lea, Flood 2014) over `key + counter * gamma`; torch's int64
arithmetic wraps, which is all it needs.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from statistics import NormalDist

import torch

_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_TABLE_SIZE = 65_536
_CHUNK = 1 << 20  # hashes at a time: bounds memory, changes no bit


def hash64(seed: int, stream: str, start: int, count: int, device: torch.device | str) -> torch.Tensor:
    """The 64-bit hashes of counters [start, start + count): int64 [count]."""
    key = int.from_bytes(hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=8).digest(), "little")
    x = torch.arange(start, start + count, dtype=torch.int64, device=device)  # [count]
    x = x * _signed(_GAMMA) + _signed(key)
    x = (x ^ _shift_right(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MIX_2)
    return x ^ _shift_right(x, 31)


def normal(
    seed: int, stream: str, shape: Sequence[int], device: torch.device | str, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """N(0, 1) as one of 65,536 float32 quantiles (|x| < 4.33), rounded to `dtype`: `dtype` [*shape].

    One hash gives four 16-bit indices into the table.
    """
    count = math.prod(shape)
    table = _quantiles(str(torch.device(device)))  # [65536]
    out = torch.empty(count, dtype=dtype, device=device)
    for start in range(0, -(-count // 4), _CHUNK):
        hashes = hash64(seed, stream, start, min(_CHUNK, -(-count // 4) - start), device)
        index = hashes.view(torch.int16).to(torch.int32) + _TABLE_SIZE // 2  # [4 * hashes]
        part = out[4 * start : 4 * (start + len(hashes))]
        part.copy_(table[index[: len(part)]])
    return out.view(*shape)


def uniform(seed: int, stream: str, shape: Sequence[int], device: torch.device | str) -> torch.Tensor:
    """Multiples of 2^-24 in [0, 1): float32 [*shape]."""
    bits = _shift_right(hash64(seed, stream, 0, math.prod(shape), device), 40)
    return (bits.to(torch.float32) * 2.0**-24).view(*shape)


def integers(seed: int, stream: str, shape: Sequence[int], high: int, device: torch.device | str) -> torch.Tensor:
    """Integers in [0, high): int64 [*shape]. The bias is below high / 2^63."""
    return (_shift_right(hash64(seed, stream, 0, math.prod(shape), device), 1) % high).view(*shape)


def permutation(seed: int, stream: str, count: int) -> tuple[int, ...]:
    """A permutation of range(count)."""
    return tuple(torch.argsort(hash64(seed, stream, 0, count, "cpu"), stable=True).tolist())


@functools.lru_cache(maxsize=8)
def _quantiles(device: str) -> torch.Tensor:
    """Quantiles of N(0, 1) at (i + 1/2) / 65536: float32 [65536], antisymmetric to the bit."""
    half = _TABLE_SIZE // 2
    upper = [NormalDist().inv_cdf((i + 0.5) / _TABLE_SIZE) for i in range(half, _TABLE_SIZE)]
    return torch.tensor([-x for x in reversed(upper)] + upper, dtype=torch.float32).to(device)


def _signed(x: int) -> int:
    """The int64 with the bits of the uint64 `x`."""
    return x - (1 << 64) if x >= 1 << 63 else x


def _shift_right(x: torch.Tensor, n: int) -> torch.Tensor:
    """Logical right shift of int64."""
    return (x >> n) & ((1 << (64 - n)) - 1)
