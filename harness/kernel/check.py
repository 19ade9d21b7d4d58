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
    _check_descales(contract, case, args)


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
    q_dtype = element_type(case.query_dtype).torch
    wanted: list[tuple[str, torch.Tensor | None, torch.dtype, tuple[int | None, ...]]] = [
        ("q", args.q, q_dtype, (tokens, case.num_q_heads, case.head_size)),
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
    """`k_scale` and `v_scale`: one for all or one for each KV head; NaN where there is another kind of descale."""
    count = case.num_kv_heads if case.descales_per == "head" else 1
    for name in ("k_scale", "v_scale"):
        scale = getattr(args, name)
        if scale.dtype != torch.float32 or tuple(scale.shape) != (count,):
            what = "one float32 element" if count == 1 else f"{count} float32 elements, one for each KV head,"
            raise SetupBug(name, f"{what} on the device", f"{list(scale.shape)} of {_name(scale.dtype)}")
        for head, value in enumerate(scale.tolist()):
            if case.descales_per in ("page", "token"):
                if not math.isnan(value):
                    raise SetupBug(name, f"NaN, as descales come by {case.descales_per}", repr(value))
            elif not 0.0 < value < math.inf:
                where = f" for kv head {head}" if case.descales_per == "head" else ""
                raise SetupBug(name, f"a finite descale above 0{where}", repr(value))
            elif case.kv_dtype == "auto" and value != 1.0:
                raise SetupBug(name, "1.0, as kv_dtype auto stores values unscaled", repr(value))
    for name, stored in (("q_descale", case.q_dtype), ("output_scale", case.out_dtype)):
        given = getattr(args, name)
        if (given is None) != (stored == "auto"):
            words = {True: "a tensor", False: "None"}
            raise SetupBug(name, f"{words[stored != 'auto']}, as that is stored as {stored}", words[given is not None])
        if given is None:
            continue
        if given.dtype != torch.float32 or given.shape != (1,) or not 0.0 < float(given) < math.inf:
            raise SetupBug(name, "one float32 element, finite and above 0", f"{given.tolist()} of {_name(given.dtype)}")


def _check_descales(contract: Contract, case: Case, args: LaunchArguments) -> None:
    """Descales by page or by token: float32, finite and above 0 for each that a live token needs; else None."""
    pages = args.k_cache.shape[0]
    buffers: dict[str, tuple[str, tuple[int | None, ...]]] = {  # what for, and the shape
        "kv_block_descale": ("page", (pages, case.num_kv_heads, 2)),
        "k_token_descale": ("token", (pages, case.page_size, case.num_kv_heads)),
        "v_token_descale": ("token", (pages, case.page_size, case.num_kv_heads)),
    }
    for name, (granularity, shape) in buffers.items():
        tensor = getattr(args, name)
        demanded, given = case.descales_per == granularity, tensor is not None
        if demanded != given:
            words = {True: "a tensor", False: "None"}
            raise SetupBug(name, f"{words[demanded]}, as descales are per {case.descales_per}", words[given])
        if tensor is None:
            continue
        if tensor.dtype != torch.float32 or tensor.device != args.q.device:
            raise SetupBug(name, f"float32 on {args.q.device}", f"{_name(tensor.dtype)} on {tensor.device}")
        _check_shape(name, tensor, shape)
        _check_live(contract, case, args, name, tensor)


def _check_live(contract: Contract, case: Case, args: LaunchArguments, name: str, tensor: torch.Tensor) -> None:
    """What tokens need of `tensor` ([pages, kv_heads, 2] or [pages, page_size, kv_heads]) is finite and above 0, but
    for pages that are dead.
    """
    per_page = name == "kv_block_descale"
    gone = dead_columns(case, contract.content, contract.window_pages)
    lens = zip(case.rows.query_lens, case.rows.context_lens, strict=True)
    for seq, (query_len, context_len) in enumerate(lens):
        seq_len = max(query_len + context_len, 0)
        count = -(-seq_len // case.page_size) if per_page else contract.content.cached_len(query_len, context_len)
        place = torch.arange(count, device=tensor.device)  # columns of the table, or positions
        ids = page_ids(args, seq, count if per_page else -(-count // case.page_size)).long()
        page = ids if per_page else ids[place // case.page_size]  # [count]
        found = tensor[page] if per_page else tensor[page, place % case.page_size]  # [count, kv_heads(, 2)]
        dead = ~((found > 0) & found.isfinite())
        per_column = 1 if per_page else case.page_size
        dead[gone[seq].start * per_column : gone[seq].stop * per_column] = False
        if bool(dead.any()):
            at = dead.nonzero()[0].tolist()
            where = f"page {int(page[at[0]])} of sequence {seq}, kv head {at[1]}"
            where += f", {'KV'[at[2]]}" if per_page else f", slot {at[0] % case.page_size} (position {at[0]})"
            raise SetupBug(name, f"a finite descale above 0 for {where}", repr(float(found[tuple(at)])))


def _check_shape(name: str, tensor: torch.Tensor, shape: tuple[int | None, ...]) -> None:
    got = tuple(tensor.shape)
    if len(got) != len(shape) or any(want is not None and want != have for want, have in zip(shape, got, strict=True)):
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise SetupBug(name, f"shape [{wanted}]", str(list(got)))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
