"""Argument check of a cache writer: what it is handed satisfies its contract, or SetupBug names tensor, expected, got.

Invariant: a writer is launched only on arguments that pass; slots are compared with those that follow from the
placement, token by token, so that a wrong slot is never blamed on the writer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from harness.cache.slots import MORE, NO_SLOT, NewToken
from harness.case import Case
from harness.dtypes import element_type
from harness.errors import SetupBug
from harness.kernel.writer import WriterArguments, WriterContract
from harness.layout import cache_shape

_INT32 = "slots are the one index that is int64: a pool may have more than 2^31 of them"


def check_writer_arguments(
    contract: WriterContract, case: Case, args: WriterArguments, tokens: Sequence[NewToken]
) -> None:
    """Raise SetupBug for the first argument that violates `contract`; `tokens` are those that have a slot."""
    _check_tensors(contract, case, args)
    _check_slots(contract, case, args, tokens)
    for name, expected in (("layout", case.layout), ("kv_dtype", case.kv_dtype)):
        if getattr(args, name) != expected:
            raise SetupBug(f"{name} of the writer", f"{expected!r}, as the case says", repr(getattr(args, name)))


def _check_tensors(contract: WriterContract, case: Case, args: WriterArguments) -> None:
    rows, num_pages = case.rows.num_tokens + MORE, args.k_cache.shape[0]
    dtype, stored = element_type(case.dtype).torch, element_type(case.stored_dtype)

    def shape(which: str, dim: int) -> tuple[int, ...]:
        return cache_shape(case.layout, which, num_pages, case.page_size, case.num_kv_heads, dim, stored.size)

    wanted: list[tuple[str, torch.Tensor, torch.dtype, tuple[int, ...]]] = [
        ("k", args.k, dtype, (rows, case.num_kv_heads, case.head_size)),
        ("v", args.v, dtype, (rows, case.num_kv_heads, case.value_size)),
        ("k_cache", args.k_cache, stored.torch, shape("k", case.head_size)),
        ("v_cache", args.v_cache, stored.torch, shape("v", case.value_size)),
        ("slot_mapping", args.slot_mapping, getattr(torch, contract.slot_dtype), (rows,)),
    ]
    for name, tensor, expected_dtype, expected_shape in wanted:
        if tensor.dtype != expected_dtype:
            said = f"{_name(expected_dtype)} (the contract of {contract.name})"
            raise SetupBug(name, said, _name(tensor.dtype), _INT32 if name == "slot_mapping" else "")
        if tuple(tensor.shape) != expected_shape:
            raise SetupBug(f"{name} of the writer", f"shape {list(expected_shape)}", str(list(tensor.shape)))
        if tensor.device != args.k_cache.device:
            raise SetupBug(f"{name} of the writer", f"device {args.k_cache.device}", str(tensor.device))
        if tensor.numel() and tensor.stride(-1) != 1:
            raise SetupBug(f"{name} of the writer", "a last dimension of stride 1", f"stride {tensor.stride(-1)}")


def _check_slots(contract: WriterContract, case: Case, args: WriterArguments, tokens: Sequence[NewToken]) -> None:
    wanted = {one.token: one for one in tokens}
    by_slot = {one.slot: one for one in tokens}
    for token, slot in enumerate(args.slot_mapping.tolist()):
        one = wanted.get(token)
        if slot == (NO_SLOT if one is None else one.slot):
            continue
        page, offset = divmod(slot, case.page_size)
        owner = f", the slot of {by_slot[slot]}" if slot in by_slot else ""
        got = f"{slot} (page {page}, offset {offset}{owner})" if slot >= 0 else f"{slot}: not stored"
        if one is None:
            raise SetupBug("slot_mapping", f"{NO_SLOT} for token {token}, which is padding", got)
        raise SetupBug("slot_mapping", f"{one.slot} (page {one.page}, offset {one.offset}) for {one}", got)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
