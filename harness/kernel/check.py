"""Argument check: everything handed to a kernel satisfies its contract, or SetupBug names tensor, expected and got.

Invariant: a kernel is launched only on arguments that pass; so a kernel is never blamed for a wrong set-up. The content
of the cache is checked separately, slot by slot (harness.cache.verify).
"""

from __future__ import annotations

import math
from itertools import accumulate

import torch

from harness.cache.page_table import page_ids, table_name
from harness.cache.window import dead_columns
from harness.case import Case
from harness.dtypes import element_type
from harness.errors import SetupBug
from harness.kernel.arguments import LaunchArguments
from harness.kernel.contract import Contract
from harness.layout import cache_shape

_CUMSUM = "torch.cumsum of an int32 tensor returns int64: cast after it"
_TABLES = {"block_table": ("block_table",), "kv_indices": ("kv_indptr", "kv_page_indices", "kv_last_page_len")}
_PLACES = {"block_table": "column", "kv_page_indices": "entry"}
_LONG = "torch.long tables and lengths are read as pairs of int32 by kernels that do not check"


def check_arguments(contract: Contract, case: Case, args: LaunchArguments) -> None:
    """Raise SetupBug for the first argument that violates `contract`."""
    _check_index_tensors(contract, case, args)
    _check_tensors(contract, case, args)
    _check_lengths(case, args)
    _check_table(case, args)
    _check_scales(case, args)
    _check_block_descale(contract, case, args)


def _check_index_tensors(contract: Contract, case: Case, args: LaunchArguments) -> None:
    num_seqs = case.rows.num_seqs
    shapes: dict[str, tuple[int | None, ...]] = {
        "block_table": (num_seqs, None),
        "kv_indptr": (num_seqs + 1,),
        "kv_page_indices": (None,),
        "kv_last_page_len": (num_seqs,),
        "seq_lens": (num_seqs,),
        "query_start_loc": (num_seqs + 1,),
    }
    foreign = {name for form, names in _TABLES.items() if form != case.page_table for name in names}
    for name, shape in shapes.items():
        tensor = getattr(args, name)
        if (tensor is None) != (name in foreign):
            words = {True: "None", False: "a tensor"}
            expected = f"{words[name in foreign]}, as page_table is {case.page_table}"
            raise SetupBug(name, expected, words[tensor is None])
        if tensor is None:
            continue
        expected = f"{contract.index_dtype} (the contract of {contract.name})"
        if tensor.dtype != getattr(torch, contract.index_dtype):
            raise SetupBug(name, expected, _name(tensor.dtype), _CUMSUM if name == "query_start_loc" else _LONG)
        _check_shape(name, tensor, shape)


def _check_tensors(contract: Contract, case: Case, args: LaunchArguments) -> None:
    tokens, dtype = case.rows.num_tokens, element_type(case.dtype).torch
    stored = element_type(case.stored_dtype).torch
    out_dtype = element_type(contract.numerics.out_type(case.dtype)).torch
    wanted: list[tuple[str, torch.Tensor | None, torch.dtype, tuple[int | None, ...]]] = [
        ("q", args.q, dtype, (tokens, case.num_q_heads, case.head_size)),
        ("out", args.out, out_dtype, (tokens, case.num_q_heads, case.value_size)),
        ("k_cache", args.k_cache, stored, _cache_shape(case, "k", None)),
        ("v_cache", args.v_cache, stored, _cache_shape(case, "v", args.k_cache.shape[0])),
    ]
    if contract.content.takes_new_tokens:
        wanted += [
            ("k", args.k, dtype, (tokens, case.num_kv_heads, case.head_size)),
            ("v", args.v, dtype, (tokens, case.num_kv_heads, case.value_size)),
        ]
    if case.alibi:
        wanted.append(("alibi_slopes", args.alibi_slopes, torch.float32, (case.num_q_heads,)))
    if case.sinks:
        wanted.append(("sinks", args.sinks, torch.float32, (case.num_q_heads,)))
    if contract.returns_lse:
        wanted.append(("lse", args.lse, torch.float32, (tokens, case.num_q_heads)))
    for name, tensor, expected_dtype, shape in wanted:
        if tensor is None:
            raise SetupBug(name, f"a tensor (the contract of {contract.name})", "None")
        if tensor.dtype != expected_dtype:
            raise SetupBug(name, _name(expected_dtype), _name(tensor.dtype))
        if tensor.device != args.q.device:
            raise SetupBug(name, f"device {args.q.device}", str(tensor.device))
        if tensor.numel() and tensor.stride(-1) != 1:
            raise SetupBug(name, "a last dimension of stride 1", f"stride {tensor.stride(-1)}")
        _check_shape(name, tensor, shape)


def _cache_shape(case: Case, which: str, pages: int | None) -> tuple[int | None, ...]:
    dim, size = case.head_size if which == "k" else case.value_size, element_type(case.stored_dtype).size
    return (pages, *cache_shape(case.layout, which, 1, case.page_size, case.num_kv_heads, dim, size)[1:])


def _check_lengths(case: Case, args: LaunchArguments) -> None:
    starts = [0]
    for query_len in case.rows.query_lens:
        starts.append(starts[-1] + query_len)
    _check_entries("query_start_loc", args.query_start_loc, starts)
    _check_entries("seq_lens", args.seq_lens, list(case.rows.seq_lens))
    for name, values in (("max_query_len", case.rows.query_lens), ("max_seq_len", case.rows.seq_lens)):
        if getattr(args, name) < max(values):
            raise SetupBug(name, f"at least {max(values)}, the longest of the batch", str(getattr(args, name)))


def _check_entries(name: str, tensor: torch.Tensor, expected: list[int]) -> None:
    """`tensor` [n] holds the n numbers `expected`."""
    got = tensor.tolist()
    if got != expected:
        at = next(i for i, (g, e) in enumerate(zip(got, expected, strict=True)) if g != e)
        raise SetupBug(name, f"{expected[at]} at [{at}]", str(got[at]))


def _check_table(case: Case, args: LaunchArguments) -> None:
    """Every page id that a live token needs lies inside the pool; of kv_indices every sequence has its own entries."""
    num_pages, name = args.k_cache.shape[0], table_name(args)
    needed = [-(-max(seq_len, 0) // case.page_size) for seq_len in case.rows.seq_lens]
    if args.kv_indptr is not None and args.kv_last_page_len is not None:
        last = [(n - 1) % case.page_size + 1 if n > 0 else 0 for n in case.rows.seq_lens]
        _check_entries("kv_indptr", args.kv_indptr, [*accumulate(needed, initial=0)])
        _check_entries("kv_last_page_len", args.kv_last_page_len, last)
    for seq, count in enumerate(needed):
        ids = page_ids(args, seq, count).tolist()
        if count > len(ids):
            of = f"sequence {seq} ({case.rows.seq_lens[seq]} tokens)"
            raise SetupBug(name, f"{count} pages for {of}", f"{len(ids)}")
        for entry, page in enumerate(ids):
            if not 0 <= page < num_pages:
                expected = f"page ids in [0, {num_pages}) for sequence {seq}"
                raise SetupBug(name, expected, f"{page} at {_PLACES[name]} {entry}")


def _check_scales(case: Case, args: LaunchArguments) -> None:
    for name in ("k_scale", "v_scale"):
        scale = getattr(args, name)
        if scale.dtype != torch.float32 or scale.numel() != 1:
            raise SetupBug(name, "one float32 element on the device", f"{scale.numel()} of {_name(scale.dtype)}")
        value = float(scale)
        if case.descales_per_page:
            if not math.isnan(value):
                raise SetupBug(name, "NaN, as descales come by page, in kv_block_descale", repr(value))
            continue
        if not 0.0 < value < float("inf"):
            raise SetupBug(name, "a finite descale above 0", repr(value))
        if case.kv_dtype == "auto" and value != 1.0:
            raise SetupBug(name, "1.0, as kv_dtype auto stores values unscaled", repr(value))


def _check_block_descale(contract: Contract, case: Case, args: LaunchArguments) -> None:
    """[num_pages, num_kv_heads, 2] float32, finite and above 0 for every page that a live token needs, dead ones
    apart; else None.
    """
    name, block = "kv_block_descale", args.kv_block_descale
    demanded, given = case.descales_per_page, block is not None
    if demanded != given:
        words = {True: "a tensor", False: "None"}
        raise SetupBug(name, f"{words[demanded]}, as descales are {case.descales}", words[given])
    if block is None:
        return
    if block.dtype != torch.float32 or block.device != args.q.device:
        raise SetupBug(name, f"float32 on {args.q.device}", f"{_name(block.dtype)} on {block.device}")
    _check_shape(name, block, (args.k_cache.shape[0], case.num_kv_heads, 2))
    gone = dead_columns(case, contract.content, contract.window_pages)
    for seq, seq_len in enumerate(case.rows.seq_lens):
        pages = page_ids(args, seq, -(-max(seq_len, 0) // case.page_size)).long()
        dead = ~((block[pages] > 0) & block[pages].isfinite())  # [pages of the sequence, num_kv_heads, 2]
        dead[gone[seq].start : gone[seq].stop] = False
        if bool(dead.any()):
            column, head, kind = dead.nonzero()[0].tolist()
            page = int(pages[column])
            where = f"page {page} of sequence {seq}, kv head {head}, {'KV'[kind]}"
            raise SetupBug(name, f"a finite descale above 0 for {where}", repr(float(block[page, head, kind])))


def _check_shape(name: str, tensor: torch.Tensor, shape: tuple[int | None, ...]) -> None:
    got = tuple(tensor.shape)
    if len(got) != len(shape) or any(want is not None and want != have for want, have in zip(shape, got, strict=True)):
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise SetupBug(name, f"shape [{wanted}]", str(list(got)))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
