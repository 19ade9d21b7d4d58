"""Descales of a quantised cache and of an 8-bit query: what a stored payload is multiplied by to get the value.

Invariant: no value leaves the range of the stored type at its descale, but for descales `one`; a page, or a token of
it, has one descale, however many sequences hold it, or how often one does; nothing here knows where a page will lie.

Descales come in groups: all keys are one group where there is one descale per tensor or per head, the keys of a page
are one, or each key is its own.
"""

from __future__ import annotations

import torch

from harness.case import Case
from harness.dtypes import element_type
from harness.problem import random
from harness.problem.admission import pages_needed, shared_prefix_len, tied
from harness.problem.spans import key_start

_BETWEEN = {"k": (0.02, 0.15), "v": (0.25, 0.9), "q": (0.02, 0.15)}  # apart from each other and from 1: payloads of
_LOUDEST = {"k": 0.64, "v": 0.96}  # N(0, 1) stay inside, and use, the range of fp8; loud descales go down from here
_LOUD_OCTAVES = 5  # a factor of 32
_LADDER = 4096  # steps of the logarithmic scale
_QUIET = 0.02
_ROOM = 1 + 2.0**-10  # the largest element stays this far inside the range
_OUT_RANGE = (1.5, 3.0)  # the largest output that an 8-bit one holds: some rows of few keys saturate


def tensor_descale(case: Case, which: str, values: torch.Tensor) -> float:
    """A float32 descale for all of K, V or q (`which` "k", "v", "q"), larger where its largest element needs it.

    1 where it is stored as it is, and for descales `one`.
    """
    name = case.q_dtype if which == "q" else case.kv_dtype
    if name == "auto" or case.descales == "one":
        return 1.0
    low, high = _BETWEEN[which]
    drawn = low + (high - low) * float(random.uniform(case.data_seed, f"{which}_scale", (1,), "cpu"))
    largest = float(values.abs().max()) if values.numel() else 0.0
    return float(torch.tensor(max(drawn, largest / element_type(name).largest * _ROOM), dtype=torch.float32))


def output_scale(case: Case) -> float:
    """What a stored output is multiplied by to get the value, a float32; 1 where out_dtype is auto."""
    if case.out_dtype == "auto":
        return 1.0
    low, high = _OUT_RANGE
    reach = low + (high - low) * float(random.uniform(case.data_seed, "output_scale", (1,), "cpu"))
    return float(torch.tensor(reach / element_type(case.out_dtype).largest, dtype=torch.float32))


def cache_descales(case: Case, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """float32 [groups, num_kv_heads, 2] of K then V; [1, 1, 2] where there is one per tensor.

    `k` and `v` [num_keys, num_kv_heads, dim], packed by sequence. Pages are counted page after page of each sequence.
    """
    return torch.stack([_descales(case, "k", k), _descales(case, "v", v)], dim=2)


def group_of_key(case: Case) -> torch.Tensor:
    """The group of every packed key: int64 [num_keys], on the CPU."""
    starts, first, parts = key_start(case.rows), 0, [torch.zeros(0, dtype=torch.int64)]
    if case.descales_per == "token":
        return torch.arange(starts[-1])
    if case.descales_per != "page":
        return torch.zeros(starts[-1], dtype=torch.int64)
    for seq, count in enumerate(pages_needed(case)):
        parts.append(first + torch.arange(starts[seq + 1] - starts[seq]) // case.page_size)
        first += count
    return torch.cat(parts)


def _descales(case: Case, which: str, values: torch.Tensor) -> torch.Tensor:
    """float32 [groups, num_kv_heads] of K or V."""
    device, heads = values.device, case.num_kv_heads
    whole = tensor_descale(case, which, values)
    if case.descales_per == "tensor":
        return torch.full((1, 1), whole, dtype=torch.float32, device=device)
    groups = {"head": 1, "page": sum(pages_needed(case)), "token": len(values)}[case.descales_per]
    shape = (groups, heads)
    if case.descales in ("one", "equal"):
        return torch.full(shape, whole, dtype=torch.float32, device=device)
    drawn = _loud(case, which, shape, device) if case.descales == "loud" else _quiet(case, which, shape, device) * whole
    return torch.maximum(drawn, _enough(case, values, shape))[_owners(case).to(device)]


def _quiet(case: Case, which: str, shape: tuple[int, int], device: torch.device) -> torch.Tensor:
    """Factors in [1, 1.02), float32 of `shape` [groups, num_kv_heads]."""
    return random.uniform(case.data_seed, _stream(case, which), shape, device) * _QUIET + 1.0


def _loud(case: Case, which: str, shape: tuple[int, int], device: torch.device) -> torch.Tensor:
    """float32 of `shape` [groups, num_kv_heads]; a few heads take their shares of the range, so that none are near."""
    steps = [_LOUDEST[which] * 2.0 ** (-_LOUD_OCTAVES * (i + 0.5) / _LADDER) for i in range(_LADDER)]
    ladder = torch.tensor(steps, dtype=torch.float32, device=device)
    if case.descales_per != "head":
        return ladder[random.integers(case.data_seed, _stream(case, which), shape, _LADDER, device)]
    share = _LADDER // shape[1]
    rank = torch.tensor(random.permutation(case.data_seed, _stream(case, which), shape[1]), device=device)[None]
    within = random.integers(case.data_seed, f"{which}_head_share", shape, max(share // 2, 1), device)
    return ladder[rank * share + share // 4 + within]


def _stream(case: Case, which: str) -> str:
    return f"{which}_{case.descales_per}_scale"


def _enough(case: Case, values: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """The least descales, float32 of `shape` [groups, num_kv_heads], at which no element saturates."""
    stored = element_type(case.stored_dtype)
    largest = torch.zeros(shape, device=values.device)
    if values.numel():
        index = group_of_key(case).to(values.device)[:, None].expand(-1, shape[1])
        largest.scatter_reduce_(0, index, values.abs().amax(dim=2).to(torch.float32), "amax")
    return largest / torch.full_like(largest, stored.largest) * _ROOM


def _owners(case: Case) -> torch.Tensor:
    """The group whose descale each has: the first on the same page, and for tokens in the same slot; int64 [groups]."""
    if case.descales_per == "head":
        return torch.zeros(1, dtype=torch.int64)
    prefix = shared_prefix_len(case)
    if case.descales_per == "token":
        first, shared, per_page = list(key_start(case.rows)), prefix, case.page_size
    else:
        needed, shared, per_page = pages_needed(case), prefix // case.page_size, 1
        first = [sum(needed[:seq]) for seq in range(len(needed) + 1)]
    holders = [seq for seq, context_len in enumerate(case.rows.context_lens) if context_len > 0]
    owner = torch.arange(first[-1])
    for seq in holders[1:]:
        owner[first[seq] : first[seq] + shared] = owner[first[holders[0]] : first[holders[0]] + shared]
    for again, origin in tied(case, first, per_page):
        owner[again] = owner[origin]
    return owner
