"""Descales of an fp8 cache: what a stored payload is multiplied by to get the value.

Invariant: no value of a page leaves the range of the stored type at the descale of its page; a page has one descale,
however many sequences hold it, or how often one does; nothing here knows where a page will lie.
"""

from __future__ import annotations

import torch

from harness.case import Case
from harness.dtypes import element_type
from harness.problem import random
from harness.problem.admission import first_holders, pages_needed, shared_prefix_len
from harness.problem.spans import key_start

_BETWEEN = {"k": (0.02, 0.15), "v": (0.25, 0.9)}  # apart from each other and from 1: payloads of N(0, 1) stay inside,
_LOUDEST = {"k": 0.64, "v": 0.96}  # and use, the range of fp8; loud descales go down from here
_LOUD_OCTAVES = 5  # a factor of 32
_LADDER = 4096  # steps of the logarithmic scale
_QUIET = 0.02
_ROOM = 1 + 2.0**-10  # the largest element stays this far inside the range


def tensor_descale(case: Case, which: str, values: torch.Tensor) -> float:
    """A float32 descale for all of K (`which` "k") or V, larger where its largest element needs it.

    1 where the cache is not quantised, and for descales `one`.
    """
    if case.kv_dtype == "auto" or case.descales == "one":
        return 1.0
    low, high = _BETWEEN[which]
    drawn = low + (high - low) * float(random.uniform(case.data_seed, f"{which}_scale", (1,), "cpu"))
    largest = float(values.abs().max()) if values.numel() else 0.0
    enough = largest / element_type(case.stored_dtype).largest
    return float(torch.tensor(max(drawn, enough * _ROOM), dtype=torch.float32))


def page_descales(case: Case, which: str, values: torch.Tensor) -> torch.Tensor:
    """float32 [logical pages, num_kv_heads]: descales `quiet` or `loud` of every page and head, page after page of each
    sequence. `values` [num_keys, num_kv_heads, dim], packed by sequence.
    """
    device, heads = values.device, case.num_kv_heads
    shape = (sum(pages_needed(case)), heads)
    stream = f"{which}_page_scale"
    if case.descales == "loud":
        top = _LOUDEST[which]
        steps = [top * 2.0 ** (-_LOUD_OCTAVES * (i + 0.5) / _LADDER) for i in range(_LADDER)]
        ladder = torch.tensor(steps, dtype=torch.float32, device=device)
        drawn = ladder[random.integers(case.data_seed, stream, shape, _LADDER, device)]
    else:
        drawn = random.uniform(case.data_seed, stream, shape, device) * _QUIET + 1.0
        drawn = drawn * tensor_descale(case, which, values)
    owner = _owners(case).to(device)
    largest = torch.zeros(shape, device=device)
    if values.numel():
        index = page_of_key(case).to(device)[:, None].expand(-1, heads)
        largest.scatter_reduce_(0, index, values.abs().amax(dim=2).to(torch.float32), "amax")
    enough = largest / torch.full_like(largest, element_type(case.stored_dtype).largest) * _ROOM
    return torch.maximum(drawn, enough)[owner]


def page_of_key(case: Case) -> torch.Tensor:
    """Logical page of every packed key, counted over all sequences: int64 [num_keys], on the CPU."""
    starts, first, parts = key_start(case.rows), 0, [torch.zeros(0, dtype=torch.int64)]
    for seq, count in enumerate(pages_needed(case)):
        parts.append(first + torch.arange(starts[seq + 1] - starts[seq]) // case.page_size)
        first += count
    return torch.cat(parts)


def _owners(case: Case) -> torch.Tensor:
    """The logical page whose descale each has: the first on the same physical page; int64 [logical pages]."""
    needed, shared = pages_needed(case), shared_prefix_len(case) // case.page_size
    first = [sum(needed[:seq]) for seq in range(len(needed))]
    holders = [seq for seq, context_len in enumerate(case.rows.context_lens) if context_len > 0]
    owner = torch.tensor(
        [first[seq] + page for seq, pages in enumerate(first_holders(case)) for page in pages],
        dtype=torch.int64,
    )
    for seq in holders[1:]:
        owner[first[seq] : first[seq] + shared] = owner[first[holders[0]] : first[holders[0]] + shared]
    return owner
