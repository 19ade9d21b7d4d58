"""unified_paged answers as dense float64 attention does, touches nothing else, and its likely faults are seen."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from harness.interpreter import prepare
from harness.interpreter.errors import MemoryFault
from harness.kernel.registry import find_kernels, load_entry
from tests.kernels.paged_problem import Paged, build, run_strictly, with_fault, wrong

prepare("cpu")

CONTRACT = find_kernels()["unified_paged"]
LONG = Paged(context_lens=(200, 130, 90))  # several key tiles, so that splits differ

HONEST = {
    "mixed batch": Paged(),
    "one decode row": Paged(query_lens=(1,), context_lens=(63,)),
    "tile edges": Paged(query_lens=(32, 33, 31), context_lens=(0, 31, 33), num_kv_heads=1),
    "fp16": Paged(dtype="fp16"),
    "bf16": Paged(dtype="bf16"),
    "fp32 queries, e4m3 cache": Paged(kv_dtype="fp8_e4m3"),
    "fp16 queries, e5m2 cache": Paged(dtype="fp16", kv_dtype="fp8_e5m2", strided=True),
    "bf16 queries, e4m3 cache, classic": Paged(dtype="bf16", kv_dtype="fp8_e4m3", layout="vllm_classic"),
    "page 1": Paged(page_size=1),
    "page 1, three dimensions": Paged(page_size=1, layout="linear_3d"),
    "hnd, strided": Paged(layout="hnd", strided=True, page_size=24),
    "vectorized": Paged(layout="vectorized", page_size=24, head_size_v=48),
    "vectorized, strided, bf16": Paged(layout="vectorized", strided=True, dtype="bf16"),
    "list of pages": Paged(page_table="kv_indices"),
    "list of pages, page 1, an empty row": Paged(
        page_table="kv_indices", page_size=1, query_lens=(5, 1, 3), context_lens=(30, -1, 2)
    ),
    "list of pages, page 544, vectorized": Paged(page_table="kv_indices", page_size=544, layout="vectorized"),
    "page 24, head 24, window": Paged(page_size=24, head_size=24, head_size_v=24, window=17),
    "page 544": Paged(page_size=544, head_size=80, head_size_v=96),
    "classic, page 32": Paged(page_size=32, layout="vllm_classic", head_size=96, head_size_v=96),
    "head_size_v wider": Paged(head_size=24, head_size_v=48),
    "head_size_v narrower": Paged(head_size=48, head_size_v=8),
    "head 256": Paged(query_lens=(3,), context_lens=(40,), head_size=256, head_size_v=256, num_kv_heads=1),
    "strided": Paged(strided=True),
    "strided classic": Paged(strided=True, layout="vllm_classic"),
    "gqa 1": Paged(gqa_ratio=1, num_kv_heads=3),
    "gqa 3": Paged(gqa_ratio=3),
    "gqa 17": Paged(gqa_ratio=17, num_kv_heads=2, query_lens=(5, 1), context_lens=(30, 40)),
    "gqa 64": Paged(gqa_ratio=64, num_kv_heads=1, query_lens=(1, 1), context_lens=(30, 70)),
    "window 1": Paged(window=1),
    "window skips tiles": replace(LONG, window=50),
    "window and sink tokens": Paged(window=9, sink_tokens=3),
    "window and sink tokens of several tiles": replace(LONG, window=20, sink_tokens=70),
    "window and more sink tokens than keys": Paged(window=2, sink_tokens=99),
    "window and sink tokens, split": replace(LONG, window=20, sink_tokens=70, num_splits=3),
    "window and sink tokens, not causal": replace(LONG, window=50, sink_tokens=3, causal=False, alibi=True),
    "sink tokens without a window": Paged(sink_tokens=3),
    "not causal": Paged(causal=False),
    "not causal, window": Paged(causal=False, window=9),
    "soft cap": Paged(cap=1.5, gain=3.0),
    "alibi": Paged(alibi=True),
    "sinks": Paged(sinks=True),
    "everything": Paged(alibi=True, sinks=True, cap=2.0, window=21, kv_dtype="fp8_e4m3", strided=True),
    "queries before keys": Paged(query_lens=(5, 1, 6), context_lens=(-5, -1, -2)),
    "queries before keys, sinks": Paged(query_lens=(5, 1, 6), context_lens=(-5, -1, -2), sinks=True),
    "scores spread over hundreds": replace(LONG, gain=80.0),
    "split": replace(LONG, num_splits=3),
    "split, sinks, bf16": replace(LONG, num_splits=2, sinks=True, dtype="bf16"),
    "split, window, strided": replace(LONG, num_splits=5, window=50, strided=True, gain=80.0),
    "more splits than tiles": Paged(num_splits=7, sinks=True),
    "one split": Paged(num_splits=1),
    "split, queries before keys": Paged(query_lens=(5, 1, 6), context_lens=(-5, -1, -2), num_splits=2),
    "split, not causal, soft cap, alibi": replace(LONG, num_splits=4, causal=False, cap=2.0, alibi=True),
}


@pytest.mark.parametrize("problem", HONEST.values(), ids=HONEST.keys())
def test_answers_as_dense_attention(problem: Paged) -> None:
    built = build(problem)
    session = run_strictly(load_entry(CONTRACT), built.args)
    assert wrong(built) is None
    assert not session.violations
    expected = ("unified_paged_kernel", "split_kv_combine_kernel")[: 2 if problem.num_splits else 1]
    assert tuple(launch.kernel for launch in session.launches) == expected
    assert set(expected) <= set(CONTRACT.launches)


def test_lse_is_optional() -> None:
    built = build(replace(LONG, num_splits=2), with_lse=False)
    run_strictly(load_entry(CONTRACT), built.args)
    assert wrong(built) is None


# name: (source, what it becomes, the problem that shows it)
FAULTS = {
    "newest token missing": ("    end_key = seq_len\n", "    end_key = seq_len - 1\n", Paged(
        causal=False, query_lens=(1,), context_lens=(64,))),
    "causal top-left": ("query_pos = context_len + query", "query_pos = query", Paged()),
    "last tile of the causal range": ("context_len + last_query + 1)", "context_len + last_query)", Paged(
        query_lens=(1,), context_lens=(64,))),
    "window starts late": ("gqa_ratio - window + 1, 0)", "gqa_ratio - window + 2, 0)", Paged(
        window=2, query_lens=(1,), context_lens=(64,))),
    "sink tokens dropped": ("CAUSAL, sink_tokens)", "CAUSAL, 0)", Paged(window=9, sink_tokens=3)),
    "one sink token too many": ("CAUSAL, sink_tokens)", "CAUSAL, sink_tokens + 1)", Paged(window=9, sink_tokens=3)),
    "one sink token too few": ("CAUSAL, sink_tokens)", "CAUSAL, sink_tokens - 1)", Paged(window=9, sink_tokens=3)),
    "sink tokens beyond the causal edge": (
        "CAUSAL, sink_tokens)\n", "CAUSAL, sink_tokens) | (key[None, :] < sink_tokens)\n", Paged(
        window=9, sink_tokens=3, query_lens=(5,), context_lens=(0,))),
    "tiles of sink tokens not visited": ("sink_tiles = tl.cdiv(", "sink_tiles = 0 * tl.cdiv(", replace(
        LONG, window=9, sink_tokens=3)),
    "sink tokens of another split": (
        "tl.minimum(tl.minimum(sink_tokens, first_key), end_key)", "tl.minimum(sink_tokens, first_key)", replace(
        LONG, window=20, sink_tokens=70, num_splits=7)),
    "V tail not masked": ("mask=cached[:, None] & (dim_v < head_size_v)[None, :], other=0.0)\n        if", (
        "mask=(dim_v < head_size_v)[None, :], other=0.0)\n        if"), Paged(query_lens=(1,), context_lens=(40,))),
    "page table read behind the row": ("mask=cached, other=0)", "mask=key >= 0, other=0)", Paged(
        query_lens=(5,), context_lens=(30,))),
    "page of the first key": ("table_row + key // page_size", "table_row + key * 0", Paged()),
    "slots of a vector all alike": ("v_stride_slot_lane, SLOT_VECTOR,\n", "0, SLOT_VECTOR,\n", Paged(
        layout="vectorized")),
    "list of the first sequence": ("kv_page_indices_ptr + first", "kv_page_indices_ptr", Paged(
        page_table="kv_indices")),
    "length without the last page": ("tl.load(kv_last_page_len_ptr + seq)", "page_size", Paged(
        page_table="kv_indices", causal=False)),
    "gqa modulo": ("head = kv_head * gqa_ratio + row % gqa_ratio", (
        "head = kv_head + (row % gqa_ratio) * tl.num_programs(1)"), Paged()),
    "scale of K for V": ("tl.load(v_descale_ptr + kv_head", "tl.load(k_descale_ptr + kv_head", Paged(
        kv_dtype="fp8_e4m3")),
    "K not scaled": ("(payload_values(k, CACHE_MANTISSA) * k_scale)", "payload_values(k, CACHE_MANTISSA)", Paged(
        kv_dtype="fp8_e5m2")),
    "accumulator not rescaled": ("acc = acc * alpha[:, None] + tl.dot", "acc = acc + tl.dot", LONG),
    "soft cap after the mask": ("scores = soft_cap(scores, cap)", "scores = soft_cap(scores + 1.0, cap)", Paged(
        cap=2.0)),
    "alibi mirrored": ("(key[None, :] - query_pos[:, None])", "(query_pos[:, None] - key[None, :])", Paged(alibi=True)),
    "alibi from the first key": ("(key[None, :] - query_pos[:, None])", "(key[None, :] - query[:, None])", Paged(
        alibi=True)),  # seen in the LSE only: a constant shift of all scores
    "sink in every split": ("initial_max_and_sum(None, head", "initial_max_and_sum(sinks_ptr, head", replace(
        LONG, sinks=True, num_splits=2)),
    "sink dropped with splits": ("args.seq_lens, args.sinks, args.out", "args.seq_lens, None, args.out", replace(
        LONG, sinks=True, num_splits=2)),
    "empty splits merged": ("for split in range(0, with_keys)", "for split in range(0, num_splits)", Paged(
        num_splits=4)),
    "last split lost": ("for split in range(0, with_keys)", "for split in range(0, with_keys - 1)", replace(
        LONG, num_splits=2)),
    "splits overlap": ("end_key = tl.minimum(first_key + owned, seq_len)", "end_key = seq_len", replace(
        LONG, num_splits=2)),
    "split output not rescaled": ("part * beta[:, None]", "part", replace(LONG, num_splits=2)),
    "empty row not guarded": ("acc / tl.where(empty, 1.0, row_sum)[:, None]", "acc / row_sum[:, None]", Paged(
        query_lens=(3,), context_lens=(-1,))),
    "LSE without the maximum": ("row_max + tl.log(", "tl.log(", Paged()),
    "out stored with q's stride": ("*args.q.stride(), *args.out.stride(), *lse", (
        "*args.q.stride(), *args.q.stride(), *lse"), Paged(head_size=32, head_size_v=16)),
}  # fmt: skip


@pytest.mark.parametrize(("old", "new", "problem"), FAULTS.values(), ids=FAULTS.keys())
def test_planted_fault_shows(tmp_path: Path, old: str, new: str, problem: Paged) -> None:
    honest = build(problem)
    run_strictly(load_entry(CONTRACT), honest.args)
    assert wrong(honest) is None
    faulty = build(problem)
    try:
        run_strictly(with_fault(CONTRACT, tmp_path, old, new), faulty.args)
    except MemoryFault:
        return
    assert wrong(faulty) is not None


def test_a_row_stored_twice_is_recorded(tmp_path: Path) -> None:
    fault = with_fault(CONTRACT, tmp_path, "tile = tl.program_id(0) // num_splits", "tile = 0")
    session = run_strictly(fault, build(Paged(query_lens=(40,), context_lens=(0,))).args)
    assert [v.kind for v in session.violations] == ["double_store"] * len(session.violations) != []


@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize(("head_size", "head_size_v"), [(8, 8), (24, 128), (256, 256), (192, 128), (576, 512)])
def test_tiles_fit_shared_memory(element_size: int, head_size: int, head_size_v: int) -> None:
    tiles_for = sys.modules[load_entry(CONTRACT).__module__].tiles_for
    for max_rows in (1, 16, 17, 10_000):
        tiles = tiles_for(head_size, head_size_v, element_size, max_rows)
        tile_bytes = (tiles.rows * tiles.dims + tiles.keys * (tiles.dims + tiles.dims_v)) * element_size
        assert tile_bytes <= 227 * 1024
        assert min(tiles) >= 16
        assert tiles.dims >= head_size
        assert tiles.dims_v >= head_size_v


def test_honest_and_wrong_are_told_apart() -> None:
    """The comparison itself: an untouched answer is right, one element off or one NaN is wrong."""
    built = build(Paged(strided=True))
    built.args.out.copy_(built.out)
    assert built.args.lse is not None
    built.args.lse.copy_(built.lse)
    assert wrong(built) is None
    built.args.lse[3, 1] += 1e-3
    assert "lse" in str(wrong(built))
    built.args.lse.copy_(built.lse)
    built.args.out[7, 0, 5] = torch.nan
    assert "out" in str(wrong(built))
    built.args.out.copy_(built.out)
    built.gaps[0, 0, 0] = 0.0
    assert "outside" in str(wrong(built))
