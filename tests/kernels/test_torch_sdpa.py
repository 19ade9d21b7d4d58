"""torch_sdpa_paged answers as dense float64 attention does, far closer than one rounding of P would allow."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from harness.kernel.registry import find_kernels, load_entry
from tests.kernels.paged_problem import Built, Paged, build, with_fault, wrong

CONTRACT = find_kernels()["torch_sdpa_paged"]

HONEST = {
    "mixed batch": Paged(),
    "fp16": Paged(dtype="fp16"),
    "bf16": Paged(dtype="bf16"),
    "fp32 queries, e4m3 cache": Paged(kv_dtype="fp8_e4m3"),
    "fp16 queries, e5m2 cache, strided": Paged(dtype="fp16", kv_dtype="fp8_e5m2", strided=True),
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
    "page 24, window": Paged(page_size=24, head_size=24, head_size_v=80, window=17),
    "page 544": Paged(page_size=544),
    "strided": Paged(strided=True),
    "strided classic": Paged(strided=True, layout="vllm_classic", page_size=32),
    "gqa 17": Paged(gqa_ratio=17),
    "gqa 64": Paged(gqa_ratio=64, num_kv_heads=1, query_lens=(1,), context_lens=(70,)),
    "window 1": Paged(window=1),
    "window and sink tokens": Paged(window=9, sink_tokens=3, alibi=True),
    "not causal": Paged(causal=False),
    "not causal, window": Paged(causal=False, window=9),
    "soft cap": Paged(cap=1.5, gain=3.0),
    "alibi, fp16": Paged(alibi=True, dtype="fp16"),
    "sinks": Paged(sinks=True),
    "everything": Paged(alibi=True, sinks=True, cap=2.0, window=21, kv_dtype="fp8_e4m3", strided=True),
    "queries before keys": Paged(query_lens=(5, 1, 6), context_lens=(-5, -1, -2)),
    "queries before keys, sinks": Paged(query_lens=(5, 1, 6), context_lens=(-5, -1, -2), sinks=True),
    "scores spread over hundreds": Paged(gain=80.0),
}


def run(problem: Paged) -> Built:
    built = build(problem, with_lse=CONTRACT.returns_lse)
    load_entry(CONTRACT)(built.args)
    return built


@pytest.mark.parametrize("problem", HONEST.values(), ids=HONEST.keys())
def test_answers_as_dense_attention(problem: Paged) -> None:
    assert wrong(run(problem)) is None


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("extra", [Paged(), Paged(alibi=True, sinks=True), Paged(cap=2.0), Paged(kv_dtype="fp8_e4m3")])
def test_only_the_output_is_rounded(dtype: str, extra: Paged) -> None:
    """p_dtype fp32: every element is within half an ulp (and a few float32 roundings) of the float64 answer."""
    built = run(replace(extra, dtype=dtype))
    half_ulp = {"fp16": 2.0**-11, "bf16": 2.0**-8}[dtype]
    error = (built.args.out.double() - built.out).abs()
    assert bool((error <= half_ulp * built.out.abs() + 2e-6).all())
    rounded_p = (built.out * (1 + half_ulp)).to(built.args.out.dtype)  # one more rounding would not pass
    assert not bool(((rounded_p.double() - built.out).abs() <= half_ulp * built.out.abs() + 2e-6).all())


def test_needs_torch_only() -> None:
    assert CONTRACT.needs == ()
    source = Path(sys.modules[load_entry(CONTRACT).__module__].__file__ or "").read_text()
    assert "triton" not in source


# name: (source, what it becomes, the problem that shows it)
FAULTS = {
    "newest token missing": ("max(seq_len, 0), seq_len - (", "max(seq_len - 1, 0), seq_len - (", Paged()),
    "causal top-left": ("query_pos = context_len + torch", "query_pos = torch", Paged()),
    "window off by one": ("-distance < args", "-distance <= args", Paged(window=4)),
    "slot within the page": ("slot = position % page_size", "slot = position * 0", Paged()),
    "tail gathered": ("torch.arange(seq_len, device=q.device) - query_pos", (
        "torch.arange(seq_len, device=q.device).clamp(max=5) - query_pos"), Paged()),
    "slots of a vector all alike": ("every, slot // x, every, slot % x", "every, slot // x, every, slot * 0", Paged(
        layout="vectorized")),
    "list of the first sequence": ("args.kv_page_indices[args.kv_indptr[seq] :]", "args.kv_page_indices", Paged(
        page_table="kv_indices")),
    "gqa modulo": ("k = keys.float().transpose(0, 1).repeat_interleave(gqa_ratio, 0)", (
        "k = keys.float().transpose(0, 1).repeat(gqa_ratio, 1, 1)"), Paged()),
    "scale of K for V": ("(args.k_scale, args.v_scale)[kind]", "(args.k_scale, args.k_scale)[kind]", Paged(
        kv_dtype="fp8_e4m3")),
    "scale after the cap": ("* scale / cap", "/ cap", Paged(cap=2.0)),
    "alibi mirrored": ("None] * distance", "None] * -distance", Paged(alibi=True)),
    "sink of another head": ("args.sinks.view(-1, 1, 1)", "args.sinks.flip(0).view(-1, 1, 1)", Paged(sinks=True)),
    "softmax scale of SDPA": ("attn_mask=bias, scale=scale", "attn_mask=bias", Paged()),
    "row without keys not 0": ("~seen.any(1)[:, None], 0.0)", "~seen.any(1)[:, None], 1.0)", Paged(
        query_lens=(3,), context_lens=(-1,))),
}  # fmt: skip


@pytest.mark.parametrize(("old", "new", "problem"), FAULTS.values(), ids=FAULTS.keys())
def test_planted_fault_shows(tmp_path: Path, old: str, new: str, problem: Paged) -> None:
    assert wrong(run(problem)) is None
    faulty = build(problem, with_lse=False)
    with_fault(CONTRACT, tmp_path, old, new)(faulty.args)
    assert wrong(faulty) is not None


def test_dead_slots_are_never_used() -> None:
    """Poison in tails, unused pages and table padding is in every problem; finite poison changes no bit either."""
    honest, other = run(Paged(seed=3)), build(Paged(seed=3), with_lse=False)
    for cache in (other.args.k_cache, other.args.v_cache):
        cache.nan_to_num_(1e4)
    load_entry(CONTRACT)(other.args)
    assert torch.equal(honest.args.out, other.args.out)
