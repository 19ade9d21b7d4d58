"""The chunked-prefill family answers as dense float64 attention does, reads nothing that is poison, and its likely
faults are seen: in the kernels' source, and in what they are handed.
"""

from __future__ import annotations

import functools
import itertools
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from harness.cache.content import Content
from harness.interpreter import prepare
from harness.interpreter.errors import MemoryFault
from harness.kernel.arguments import LaunchArguments
from harness.kernel.contract import Contract
from harness.kernel.registry import IN_TREE, Launcher, find_kernels, load_entry
from tests.kernels.paged_problem import Built, Paged, build, run_strictly, wrong

prepare("cpu")

PREFILL, DECODE, CHUNKED = (
    find_kernels()[name] for name in ("prefix_prefill", "paged_decode", "chunked_prefill_paged_decode")
)
NOWHERE = 2**31 - 1  # a page id outside every pool


class StoredTwice(Exception):
    """Two programs, of one launch or of two, stored the same element."""


def by_slot(cache: torch.Tensor, layout: str) -> torch.Tensor:
    """View of a cache as [pages, page_size, kv_heads, ...dims], to be written through."""
    if layout == "linear_nhd":
        return cache
    if layout == "hnd":
        return cache.transpose(1, 2)
    return cache.permute(0, 3, 1, 2, 4) if cache.dim() == 5 else cache.permute(0, 3, 1, 2)


def hand_over(built: Built, content: Content) -> Built:
    """The same problem for a kernel of class `content`: tokens leave the cache for k and v, poison stays behind.

    Slots and table entries of tokens that left become NaN and out of range; so are k and v rows of tokens that are in
    the cache or do not exist.
    """
    args = built.args
    if content is Content.ALL:
        return built
    starts, seq_lens, table = args.query_start_loc.tolist(), args.seq_lens.tolist(), args.block_table
    query_lens = [end - start for start, end in itertools.pairwise(starts)]
    cached_lens = [content.cached_len(q, s - q) for q, s in zip(query_lens, seq_lens, strict=True)]

    def take_out(cache: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        slots = by_slot(cache, args.layout)
        page_size, payload = slots.shape[1], slots.element_size() == 1
        new = torch.full((starts[-1], *slots.shape[2:]), torch.nan, dtype=args.q.dtype)
        for seq, (cached_len, seq_len) in enumerate(zip(cached_lens, seq_lens, strict=True)):
            for pos in range(cached_len, seq_len):
                slot = slots[int(table[seq, pos // page_size]), pos % page_size]
                new[starts[seq + 1] - seq_len + pos] = (slot.float() * scale if payload else slot).to(args.q.dtype)
                slot.copy_(torch.full(slot.shape, torch.nan).to(slot.dtype))
        return new.flatten(2) if args.q.is_contiguous() else spread(new.flatten(2))

    k, v = take_out(args.k_cache, args.k_scale), take_out(args.v_cache, args.v_scale)
    page_size = by_slot(args.k_cache, args.layout).shape[1]
    for seq, cached_len in enumerate(cached_lens):
        table[seq, -(-cached_len // page_size) :] = NOWHERE
    return replace(built, args=replace(args, k=k, v=v))


def spread(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in a view with NaN gaps in every dimension."""
    view = torch.full([n + 2 for n in tensor.shape], torch.nan, dtype=tensor.dtype)[1:-1, 1:-1, 1:-1]
    view.copy_(tensor)
    return view


def answer(contract: Contract, problem: Paged, launcher: Launcher | None = None) -> Built:
    """The problem handed over as the contract says, after the launch; raises MemoryFault and StoredTwice."""
    built = hand_over(build(problem), contract.content)
    session = run_strictly(launcher or load_entry(contract), built.args)
    if session.violations or session.cross_launch_overwrites:
        raise StoredTwice(f"{session.violations}, {session.cross_launch_overwrites} elements by two launches")
    assert {launch.kernel for launch in session.launches} <= set(contract.launches)
    return built


MIXED = Paged(dtype="fp16", query_lens=(5, 1, 20), context_lens=(30, 40, 0), gqa_ratio=3)
LONG = Paged(dtype="fp16", query_lens=(70, 1, 3), context_lens=(150, 200, 129), num_kv_heads=1)  # several tiles
EMPTY_ROWS = Paged(dtype="fp16", query_lens=(5, 1, 6), context_lens=(-5, -1, -2))

HONEST = {
    "mixed batch": MIXED,
    "several tiles": LONG,
    "tile edges": replace(LONG, query_lens=(64, 65, 63, 1, 1), context_lens=(64, 63, 0, 63, 64)),
    "query_len 2": replace(MIXED, query_lens=(1, 2, 1), context_lens=(20, 15, 0)),
    "decode rows only": replace(MIXED, query_lens=(1, 1), context_lens=(47, 0)),
    "fp32": replace(MIXED, dtype="fp32"),
    "bf16": replace(MIXED, dtype="bf16"),
    "e4m3 cache": replace(MIXED, kv_dtype="fp8_e4m3"),
    "e4m3 cache, bf16, classic, strided": replace(
        MIXED, kv_dtype="fp8_e4m3", dtype="bf16", layout="vllm_classic", strided=True
    ),
    "e5m2 cache, fp32": replace(MIXED, kv_dtype="fp8_e5m2", dtype="fp32"),
    "page 1": replace(MIXED, page_size=1),
    "page 24, head 24, window": replace(LONG, page_size=24, head_size=24, head_size_v=24, window=17),
    "page 32, classic": replace(MIXED, page_size=32, layout="vllm_classic", head_size=96, head_size_v=80),
    "page 256, head 80": replace(LONG, page_size=256, head_size=80, head_size_v=80),
    "page 544, classic": replace(MIXED, page_size=544, layout="vllm_classic"),
    "K 48, V 24": replace(MIXED, head_size=48, head_size_v=24),
    "K 24, V 48": replace(MIXED, head_size=24, head_size_v=48),
    "head 256, fp32": replace(
        MIXED, query_lens=(3, 1), context_lens=(40, 40), dtype="fp32", head_size=256, head_size_v=256, gqa_ratio=1
    ),
    "strided": replace(MIXED, strided=True),
    "strided, heads first": replace(MIXED, strided=True, layout="hnd", page_size=24),
    "strided, classic": replace(MIXED, strided=True, layout="vllm_classic"),
    **{f"gqa {n}": replace(MIXED, gqa_ratio=n, query_lens=(3, 1), context_lens=(17, 20))
       for n in (1, 5, 6, 7, 8, 17)},
    "gqa 64": replace(MIXED, gqa_ratio=64, num_kv_heads=1, query_lens=(2, 1), context_lens=(7, 20)),
    "window 1": replace(LONG, window=1),
    "window skips tiles": replace(LONG, window=50),
    "window reaches the context by one key": replace(LONG, window=71, query_lens=(71, 1), context_lens=(64, 70)),
    "not causal": replace(MIXED, causal=False),
    "not causal, window": replace(LONG, causal=False, window=9),
    "soft cap": replace(MIXED, cap=1.5, gain=3.0),
    "alibi": replace(LONG, alibi=True),
    "sinks": replace(LONG, sinks=True),
    "everything": replace(
        LONG, alibi=True, sinks=True, cap=2.0, window=21, kv_dtype="fp8_e4m3", strided=True, layout="vllm_classic"
    ),
    "queries before keys": EMPTY_ROWS,
    "queries before keys, sinks, alibi": replace(EMPTY_ROWS, sinks=True, alibi=True),
    "queries before keys, window, fp8": replace(EMPTY_ROWS, window=2, kv_dtype="fp8_e5m2", strided=True),
    "scores spread over hundreds": replace(LONG, gain=80.0),
}  # fmt: skip


@functools.cache
def clean(contract: Contract, problem: Paged) -> bool:
    """Whether the kernel as it is answers the problem right."""
    return wrong(answer(contract, problem)) is None


def decode_rows(problem: Paged) -> Paged:
    """The same lengths with every row cut to its newest token."""
    context_lens = tuple(n - 1 for n in problem.seq_lens)
    return replace(problem, query_lens=(1,) * len(context_lens), context_lens=context_lens)


@pytest.mark.parametrize("problem", HONEST.values(), ids=HONEST.keys())
@pytest.mark.parametrize("contract", [PREFILL, DECODE], ids=lambda c: c.name)
def test_answers_as_dense_attention(contract: Contract, problem: Paged) -> None:
    assert clean(contract, decode_rows(problem) if contract is DECODE else problem)


BOTH_PHASES = (
    "mixed batch", "several tiles", "tile edges", "query_len 2", "decode rows only", "bf16", "everything",
    "e4m3 cache, bf16, classic, strided", "not causal", "sinks", "queries before keys",
    "queries before keys, sinks, alibi",
)  # fmt: skip


@pytest.mark.parametrize("name", BOTH_PHASES)
def test_mixed_batch_answers_as_dense_attention(name: str) -> None:
    assert clean(CHUNKED, HONEST[name])


@pytest.mark.parametrize("contract", [PREFILL, DECODE, CHUNKED], ids=lambda c: c.name)
def test_all_scores_far_below_zero(contract: Contract) -> None:
    """A constant of -579 on every logit, far below what exp can hold, moves the LSE by as much and nothing else."""
    problem = replace(decode_rows(LONG) if contract is DECODE else LONG, dtype="fp32")
    outs, lses = [], []
    for q_0, k_0 in ((0.0, 0.0), (64.0, -64.0)):
        args = hand_over(build(problem), contract.content).args
        args.q[..., 0] = q_0
        for keys in (args.k_cache, args.k):
            if keys is not None:
                keys[..., 0] = k_0  # poison stays in the other dims
        run_strictly(load_entry(contract), args)
        assert args.lse is not None
        outs.append(args.out)
        lses.append(args.lse)
    shift = 64.0 * -64.0 * 0.8 * problem.head_size**-0.5
    assert torch.allclose(outs[0], outs[1], rtol=2e-3, atol=2e-4)
    assert torch.allclose(lses[0] + shift, lses[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("contract", [PREFILL, DECODE, CHUNKED], ids=lambda c: c.name)
def test_lse_is_optional(contract: Contract) -> None:
    problem = decode_rows(MIXED) if contract is DECODE else MIXED
    built = hand_over(build(problem, with_lse=False), contract.content)
    run_strictly(load_entry(contract), built.args)
    assert wrong(built) is None


def test_each_phase_leaves_the_other_rows_alone() -> None:
    is_decode = torch.tensor([n == 1 for n in MIXED.query_lens for _ in range(n)])
    decode = answer(DECODE, MIXED)
    assert torch.equal(decode.args.out.isnan().all((1, 2)), ~is_decode)

    prefill = hand_over(build(MIXED), Content.BY_PHASE)
    from _attnreg_kernels.chunked_prefill import prefix_prefill

    run_strictly(lambda args: prefix_prefill.launch(args, skip_decode=True), prefill.args)
    assert torch.equal(prefill.args.out.isnan().all((1, 2)), is_decode)
    assert prefill.args.lse is not None
    assert torch.equal(prefill.args.lse.isnan().all(1), is_decode)


ONE_DECODE = replace(MIXED, query_lens=(1,), context_lens=(64,))
DECODES = decode_rows(LONG)
FP8 = replace(MIXED, kv_dtype="fp8_e4m3")
P, D, S = "prefix_prefill", "paged_decode", "attention_step"

# name: (kernel, file, source, what it becomes, the problem that shows it)
SOURCE_FAULTS = {
    "context one longer": (PREFILL, P, "cached = key_pos < context_len", "cached = key_pos <= context_len", MIXED),
    "last context tile lost": (PREFILL, P, "KEYS, context_len, KEYS)", "KEYS, context_len - 1, KEYS)", replace(
        MIXED, query_lens=(5,), context_lens=(65,))),
    "causal top-left": (PREFILL, P, "query_pos = context_len + query", "query_pos = query", MIXED),
    "new token of another row": (PREFILL, P, "token_kv = (first_token + new)", "token_kv = new", MIXED),
    "tokens before position 0 read": (PREFILL, P, " & (key_pos >= 0)", "", EMPTY_ROWS),
    "causal tiles end early": (PREFILL, P, "first_query + QUERIES)", "first_query)", LONG),
    "window tiles start late": (PREFILL, P, "first_query - sliding_window + 1", (
        "first_query - sliding_window + 16"), replace(LONG, window=71, query_lens=(71, 1), context_lens=(64, 70))),
    "gqa modulo": (PREFILL, P, "q_head // gqa_ratio", "q_head % (tl.num_programs(1) // gqa_ratio)", MIXED),
    "ALiBi mirrored": (PREFILL, P, "slope = tl.load(alibi_slopes_ptr + q_head)",
        "slope = -tl.load(alibi_slopes_ptr + q_head)", replace(MIXED, alibi=True)),
    "sink not counted": (PREFILL, P, "row_sum += 1.0", "row_sum += 0.0", replace(MIXED, sinks=True)),
    "decode rows skipped": (PREFILL, P, "(query_len == 1) & (skip_decode != 0)", "query_len == 1", MIXED),
    "decode rows not skipped": (CHUNKED, P, " | ((query_len == 1) & (skip_decode != 0))", "", MIXED),
    "row tail not masked on store": (PREFILL, P,
        "mask=(query < query_len)[:, None] & (dim_v < head_size_v)[None, :],\n    )\n    if lse",
        "mask=(dim_v < head_size_v)[None, :],\n    )\n    if lse", MIXED),
    "newest token missing": (DECODE, D, "cached = key_pos < seq_len", "cached = key_pos < seq_len - 1", ONE_DECODE),
    "last tile lost": (DECODE, D, "KEYS, seq_len, KEYS)", "KEYS, seq_len - 1, KEYS)", ONE_DECODE),
    "page table read behind the row": (DECODE, D, "mask=cached, other=0)", "mask=key_pos >= 0, other=0)", ONE_DECODE),
    "window one short": (DECODE, D, "query_pos = seq_len - 1", "query_pos = seq_len", replace(DECODES, window=2)),
    "first page only": (DECODE, D, "key_pos // page_size", "key_pos // page_size * 0", DECODES),
    "gqa modulo, decode": (DECODE, D, "kv_head * gqa_ratio + member", "kv_head + member * tl.num_programs(1)",
        decode_rows(MIXED)),
    "padding heads stored": (DECODE, D, "mask=in_group[:, None] & (dim_v < head_size_v)[None, :]",
        "mask=(member >= 0)[:, None] & (dim_v < head_size_v)[None, :]", decode_rows(MIXED)),
    "K scale for V": (CHUNKED, P, "v_cache_ptr, v_scale_ptr, page", "v_cache_ptr, k_scale_ptr, page", FP8),
    "fp8 not scaled": (CHUNKED, S, " * tl.load(scale_ptr + kv_head * stride_scale)", "", FP8),
    "tail of last page not masked": (CHUNKED, S, "mask=keep[:, None] & (dim", "mask=(dim", MIXED),
    "padded dims not masked": (CHUNKED, S, " & (dim < head_size)[None, :]", "", replace(
        MIXED, head_size=24, strided=True)),
    "accumulator not rescaled": (CHUNKED, S, "acc * rescale[:, None]", "acc", LONG),
    "sum not rescaled": (CHUNKED, S, "row_sum * rescale", "row_sum", LONG),
    "fully masked tile not guarded": (CHUNKED, S, 'tl.where(new_max == float("-inf"), 0.0, new_max)', (
        "new_max"), EMPTY_ROWS),
    "empty row not guarded": (CHUNKED, S, "tl.where(row_sum == 0.0, 1.0, row_sum)", "row_sum", EMPTY_ROWS),
    "soft cap before the scale": (CHUNKED, S, "soft_cap(scores, cap)", "soft_cap(scores / softmax_scale, cap)", replace(
        MIXED, cap=1.5)),
    "LSE without the maximum": (CHUNKED, S, "row_max + tl.log(divisor)", "tl.log(divisor)", MIXED),
    "decode rows left out": (CHUNKED, "chunked_prefill_paged_decode", "    paged_decode.launch(args)", "", MIXED),
}  # fmt: skip


@pytest.mark.parametrize(
    ("contract", "file", "old", "new", "problem"), SOURCE_FAULTS.values(), ids=SOURCE_FAULTS.keys()
)
def test_fault_in_the_source_shows(
    tmp_path: Path, contract: Contract, file: str, old: str, new: str, problem: Paged
) -> None:
    assert clean(contract, problem)
    assert seen(lambda: answer(contract, problem, planted(contract, tmp_path, file, old, new)))


def planted(contract: Contract, folder: Path, file: str, old: str, new: str) -> Launcher:
    """The kernel with `old`, which occurs once in `file`, replaced by `new` in a copy of its family."""
    assert contract.folder is not None
    for name in ("_shared", contract.folder.name):
        shutil.copytree(IN_TREE / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / contract.folder.name / f"{file}.py"
    source = path.read_text()
    assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times"
    path.write_text(source.replace(old, new))
    return load_entry(replace(contract, folder=path.parent))


def seen(run: Callable[[], Built]) -> bool:
    """Whether a fault shows: in the output, as an address outside the arguments, or as an element stored twice."""
    try:
        return wrong(run()) is not None
    except (MemoryFault, StoredTwice):
        return True


def heads_modulo(args: LaunchArguments) -> LaunchArguments:
    """q heads in the order in which q_head % num_kv_heads is the right KV head."""
    q = args.q.unflatten(1, (args.k_cache.shape[2], -1)).transpose(1, 2).flatten(1, 2)
    return replace(args, q=q)


# name: (kernel, problem, what is handed over instead)
ARGUMENT_FAULTS: dict[str, tuple[Contract, Paged, Callable[[LaunchArguments], LaunchArguments]]] = {
    "lengths one short": (DECODE, DECODES, lambda a: replace(a, seq_lens=a.seq_lens - 1)),
    "lengths one long": (CHUNKED, MIXED, lambda a: replace(a, seq_lens=a.seq_lens + 1)),
    "heads modulo": (PREFILL, MIXED, heads_modulo),
    "scales swapped": (PREFILL, FP8, lambda a: replace(a, k_scale=a.v_scale, v_scale=a.k_scale)),
    "pages swapped": (PREFILL, MIXED, lambda a: replace(a, block_table=a.block_table.flip(0))),
    "softmax scale 2 % off": (
        DECODE, replace(DECODES, dtype="fp32"), lambda a: replace(a, softmax_scale=a.softmax_scale * 1.02)),
    "window one wider": (PREFILL, replace(MIXED, window=7), lambda a: replace(a, sliding_window=8)),
    "causal off": (PREFILL, MIXED, lambda a: replace(a, causal=False)),
    "ALiBi dropped": (DECODE, replace(DECODES, alibi=True), lambda a: replace(a, alibi_slopes=None)),
    "sinks dropped": (CHUNKED, replace(MIXED, sinks=True), lambda a: replace(a, sinks=None)),
    "soft cap dropped": (CHUNKED, replace(MIXED, cap=1.5), lambda a: replace(a, logits_soft_cap=0.0)),
    "longest query understated": (PREFILL, LONG, lambda a: replace(a, max_query_len=64)),
}  # fmt: skip


@pytest.mark.parametrize(("contract", "problem", "fault"), ARGUMENT_FAULTS.values(), ids=ARGUMENT_FAULTS.keys())
def test_fault_in_the_arguments_shows(
    contract: Contract, problem: Paged, fault: Callable[[LaunchArguments], LaunchArguments]
) -> None:
    assert clean(contract, problem)
    assert seen(lambda: answer(contract, problem, lambda args: load_entry(contract)(fault(args))))


@pytest.mark.parametrize("contract", [DECODE, CHUNKED], ids=lambda c: c.name)
def test_a_cache_filled_as_for_prefill_only_shows(contract: Contract) -> None:
    """The set-up fault this family invites: decode rows whose newest token is in no cache."""
    built = hand_over(build(decode_rows(MIXED)), Content.CONTEXT)
    run_strictly(load_entry(contract), built.args)
    assert wrong(built) is not None


@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize(("head_size", "head_size_v"), [(8, 8), (24, 128), (256, 256), (192, 128), (576, 512)])
def test_tiles_fit_shared_memory(element_size: int, head_size: int, head_size_v: int) -> None:
    load_entry(PREFILL)
    from _attnreg_kernels.chunked_prefill.attention_step import tiling

    tile = tiling(head_size, head_size_v, element_size)
    row, row_v = tile.head_size * element_size, tile.head_size_v * element_size
    assert tile.queries * row + tile.keys * (row + row_v) <= 227 * 1024
    assert tile.head_size >= head_size
    assert tile.head_size_v >= head_size_v
    assert min(tile) >= 16  # what tl.dot takes
