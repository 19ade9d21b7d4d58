"""Fault models have the effect of kernels with that fault; blind cases are told from those that see."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch

from harness.case import Case, Rows
from harness.kernel.contract import Contract
from harness.kernel.registry import find_kernels
from harness.matrix import FAULTS
from harness.oracle.excuses import SPLIT_TILES
from harness.oracle.faults import FAULT_MODELS
from harness.oracle.observability import CERTAIN, MARGIN, Effect, blind_to, known_tolerance, observe
from harness.oracle.scene import Batch
from harness.oracle.scene_sampling import MAX_ROWS, scenes
from harness.oracle.tolerance import Tolerance, tolerance
from harness.problem.problem import build_problem
from harness.run.observe import Demand, batch_of, observe_case
from harness.run.reference import build_reference, reference_inputs
from harness.run.setup import build_arguments
from references.attention import AttentionInputs, Rounding, attend

KERNELS = find_kernels()
EXACT = Rounding(2.0**-24)
MIXED = Rows("mixed", (1, 20, 5), (150, 30, 64))
DECODE = Rows("decode", (1, 1), (150, 39))


def make(kernel: str = "unified_paged", rows: Rows = MIXED, **axes: Any) -> Case:
    defaults = {"num_q_heads": 4, "gqa_ratio": 2, "head_size": 24, "dtype": "fp16"}
    return Case(matrix="m", kernel=kernel, rows=rows, **(defaults | axes))


@dataclass(frozen=True)
class Staged:
    case: Case
    contract: Contract
    inputs: AttentionInputs
    batch: Batch
    allowed: Tolerance
    payload: tuple[torch.Tensor, torch.Tensor]

    def effect(self, fault: str) -> Effect:
        allowed = known_tolerance(self.allowed)
        with_lse = self.contract.returns_lse
        return observe(self.batch, self.contract.content, allowed, [fault], with_lse=with_lse)[0]

    def true_effect(self, faulty: tuple[torch.Tensor, torch.Tensor | None]) -> float:
        """Of a whole kernel's out and lse, over all rows and heads."""
        right = attend(self.inputs, EXACT)
        out, lse = faulty
        largest = self.allowed.largest
        sizes = [((out.clamp(-largest, largest) - right.out.clamp(-largest, largest)).abs() / self.allowed.out).max()]
        if lse is not None and self.contract.returns_lse:
            same = lse == right.lse
            sizes.append(torch.where(same, 0.0, (lse - right.lse).abs() / self.allowed.lse).max())
        return float(torch.stack(sizes).max())


@cache
def stage(case: Case) -> Staged:
    problem = build_problem(case, "cpu")
    contract = KERNELS[case.kernel].of_output(case.out_dtype, problem.output_scale)
    setup = build_arguments(problem, contract)
    cache_ = setup.cache
    reference = build_reference(problem, cache_, contract)
    allowed = tolerance(reference, contract.numerics, case.dtype, case.head_size, structured=problem.structured)
    inputs = reference_inputs(problem, cache_, contract)
    batch = batch_of(setup, inputs, contract)
    return Staged(case, contract, inputs, batch, allowed, (cache_.key_payload.float(), cache_.value_payload.float()))


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"sliding_window": 16},
    "window and sink tokens": {"sliding_window": 16, "sink_tokens": 3},
    "noncausal": {"causal": False, "sliding_window": 20},
    "modifiers": {"sinks": True, "logits_soft_cap": 30.0},
    "alibi": {"alibi": True, "sinks": True},
    "fp8": {"kv_dtype": "fp8_e4m3", "num_q_heads": 12, "gqa_ratio": 3},
    "no key": {"rows": Rows("no_key", (4, 1, 1), (-2, -1, 20)), "sinks": True},
    "context": {"kernel": "prefix_prefill", "kv_dtype": "fp8_e5m2"},
}


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES.keys())
def test_an_unchanged_scene_is_the_reference(features: dict[str, Any]) -> None:
    staged = stage(make(**features))
    right = attend(staged.inputs, EXACT)
    found = list(scenes(staged.batch))
    assert found
    for scene in found:
        heads = list(scene.q_heads)
        want = right.out[scene.tokens][:, heads].transpose(0, 1), right.lse[scene.tokens][:, heads].T
        torch.testing.assert_close(scene.right.out, want[0], rtol=1e-11, atol=1e-11)
        assert scene.right.lse is not None
        torch.testing.assert_close(scene.right.lse, want[1], rtol=1e-11, atol=1e-11)


def attended(inputs: AttentionInputs, **changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    result = attend(replace(inputs, **changes), EXACT)
    return result.out, result.lse


def without_newest(staged: Staged, rows: Callable[[int], bool]) -> tuple[torch.Tensor, torch.Tensor]:
    """The newest key of sequences whose query_len satisfies `rows` is not there."""
    return row_by_row(staged, lambda seq, pos, seq_len: min(pos + 1, seq_len - rows(staged.inputs.query_lens[seq])))


def row_by_row(staged: Staged, end: Callable[[int, int, int], int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Every row a sequence of its own that sees keys [0, end(sequence, position, seq_len))."""
    inputs = staged.inputs
    outs, lses = [], []
    token = key = 0
    for seq, (query_len, seq_len) in enumerate(zip(inputs.query_lens, inputs.seq_lens, strict=True)):
        for position in range(seq_len - query_len, seq_len):
            stop = end(seq, position, seq_len)
            keys = slice(key, key + stop)
            out, lse = attended(
                inputs,
                q=inputs.q[token : token + 1],
                k=inputs.k[keys],
                v=inputs.v[keys],
                query_lens=(1,),
                seq_lens=(stop,),
            )
            outs.append(out)
            lses.append(lse)
            token += 1
        key += seq_len
    return torch.cat(outs), torch.cat(lses)


def on_pages(
    staged: Staged, place: Callable[[range], int], change: Callable[[torch.Tensor, slice, int], None], what: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V (or one of them) changed on one page of every sequence; change(tensor, slots, page), in place."""
    page_size, start = staged.case.page_size, 0
    changed = {"k": staged.inputs.k.double(), "v": staged.inputs.v.double()}
    for seq_len, cached in zip(staged.inputs.seq_lens, staged.batch.cached_lens, strict=True):
        page = place(range((cached - 1) // page_size + 1))
        slots = slice(start + page * page_size, start + min((page + 1) * page_size, cached))
        for name in what:
            change(changed[name], slots, page)
        start += seq_len
    return attended(staged.inputs, **changed)


def gain(tensor: torch.Tensor, slots: slice, page: int) -> None:
    tensor[slots] *= 1.02


def neighbour(tensor: torch.Tensor, slots: slice, page: int) -> None:
    from_here = slots.start + (-16 if page else 16)
    tensor[slots] = tensor[from_here : from_here + slots.stop - slots.start].clone()


def beside_transitions(staged: Staged, name: str, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The 64 keys next to the page `step` away have its descale, in every sequence and page by page."""
    size, start = staged.case.page_size, 0
    descale = staged.batch.k_descale if name == "k" else staged.batch.v_descale  # [num_keys, num_kv_heads, 1]
    changed = getattr(staged.inputs, name).double()
    for cached in staged.batch.cached_lens:
        for first in range(start, start + cached, size):
            end, there = min(first + size, start + cached), first + step * size
            if start <= there < start + cached:
                keys = slice(max(end - 64, first), end) if step > 0 else slice(first, min(first + 64, end))
                changed[keys] *= descale[there].double() / descale[first].double()
        start += cached
    return attended(staged.inputs, **{name: changed})


def of_other_heads(staged: Staged, which: str) -> tuple[torch.Tensor, torch.Tensor]:
    descale = staged.batch.k_descale if which == "k" else staged.batch.v_descale  # [1, num_kv_heads, 1]
    factor = (descale[:, [1, 0]] / descale).double()
    return attended(staged.inputs, **{which: getattr(staged.inputs, which) * factor})


def of_slot_before(staged: Staged, which: str, place: Callable[[range], int]) -> tuple[torch.Tensor, torch.Tensor]:
    descale = staged.batch.k_descale if which == "k" else staged.batch.v_descale  # [num_keys, num_kv_heads, 1]

    def change(tensor: torch.Tensor, slots: slice, page: int) -> None:
        for key in range(slots.start + (page == 0), slots.stop):
            tensor[key] *= descale[key - 1].double() / descale[key].double()

    return on_pages(staged, place, change, which)


def doubled(staged: Staged, which: str) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3fnuz read as e4m3fn: twice the number, and the largest one no number at all."""
    payload, descale = {
        "k": (staged.payload[0], staged.batch.k_descale),
        "v": (staged.payload[1], staged.batch.v_descale),
    }[which]
    read = torch.where(payload.abs() == 240, 0.0, payload.double() * 2)
    return attended(staged.inputs, **{which: read * descale.double()})


def as_e5m2(staged: Staged, which: str) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3fnuz read as e5m2fnuz: four bits of exponent and three of mantissa become five and two."""
    payload, descale = {
        "k": (staged.payload[0], staged.batch.k_descale),
        "v": (staged.payload[1], staged.batch.v_descale),
    }[which]
    code = payload.to(torch.float8_e4m3fnuz).view(torch.uint8).long()
    exponent, fraction = (code & 0x7F) >> 2, code & 3
    size = torch.where(exponent > 0, (4.0 + fraction) * 2.0 ** (exponent - 18.0), fraction * 2.0**-17.0)
    read = torch.where(code >= 128, -size, size).double()
    return attended(staged.inputs, **{which: read * descale.double()})


def by_modulo(staged: Staged) -> tuple[torch.Tensor, torch.Tensor]:
    heads = [head % staged.case.num_kv_heads for head in range(staged.case.num_q_heads)]
    return attended(staged.inputs, k=staged.inputs.k[:, heads], v=staged.inputs.v[:, heads])


def tail_of_v(staged: Staged) -> tuple[torch.Tensor, None]:
    out = attended(staged.inputs)[0].clone()
    out[..., 16:] = 0
    return out, None


def tail_of_k(staged: Staged) -> tuple[torch.Tensor, torch.Tensor]:
    k = staged.inputs.k.clone()
    k[..., 16:] = 0
    return attended(staged.inputs, k=k)


def even_splits(staged: Staged, tile: int) -> tuple[torch.Tensor, None]:
    """Decode rows only: each split attended by itself, the results averaged."""
    inputs, outs, key = staged.inputs, [], 0
    for row, seq_len in enumerate(inputs.seq_lens):
        tiles = math.ceil(seq_len / tile)
        owned = math.ceil(tiles / (staged.case.num_splits or 1)) * tile
        parts = []
        for first in range(0, seq_len, owned):
            keys = slice(key + first, key + min(first + owned, seq_len))
            count = keys.stop - keys.start
            own = {"q": inputs.q[row : row + 1], "k": inputs.k[keys], "v": inputs.v[keys]}
            parts.append(attended(inputs, **own, query_lens=(1,), seq_lens=(count,))[0])
        outs.append(torch.stack(parts).mean(0))
        key += seq_len
    return torch.cat(outs), None


PLACES = {"first": lambda p: p[0], "middle": lambda p: p[len(p) // 2], "last": lambda p: p[-1]}
FP8 = {"kv_dtype": "fp8_e4m3"}
FNUZ = {"kv_dtype": "fp8_e4m3fnuz"}
LONG = {"rows": Rows("long", (1, 20, 5), (150, 60, 64))}  # every page has a neighbour that is at least as full
SPLITS = {"rows": DECODE, "num_splits": 3}
EMULATED: dict[str, tuple[dict[str, Any], list[Callable[[Staged], tuple[torch.Tensor, torch.Tensor | None]]]]] = {
    "output_zero": ({}, [lambda s: (torch.zeros_like(attended(s.inputs)[0]), None)]),
    "mean_v": ({}, [lambda s: (attended(s.inputs, q=s.inputs.q * 0)[0], None)]),
    "newest_token": ({}, [lambda s: without_newest(s, lambda q: q == 1), lambda s: without_newest(s, lambda q: q > 1)]),
    "window_edges": (
        {"sliding_window": 16},
        [lambda s: attended(s.inputs, sliding_window=17), lambda s: attended(s.inputs, sliding_window=15)],
    ),
    "sink_tokens": (
        {"sliding_window": 16, "sink_tokens": 3},
        [lambda s, n=n: attended(s.inputs, sink_tokens=n) for n in (0, 4, 2)],  # type: ignore[misc]
    ),
    "causal_edge": (
        {},
        [
            lambda s: row_by_row(s, lambda seq, pos, n: min(pos + 2, n)),
            lambda s: row_by_row(s, lambda seq, pos, n: pos),
        ],
    ),
    "page_swap": (
        LONG,
        [lambda s, at=at: on_pages(s, at, neighbour, "kv") for at in PLACES.values()],  # type: ignore[misc]
    ),
    "k_descale": (FP8, [lambda s, at=at: on_pages(s, at, gain, "k") for at in PLACES.values()]),  # type: ignore[misc]
    "v_descale": (FP8, [lambda s, at=at: on_pages(s, at, gain, "v") for at in PLACES.values()]),  # type: ignore[misc]
    "scale_dropped": (
        FP8,
        [lambda s: attended(s.inputs, k=s.payload[0]), lambda s: attended(s.inputs, v=s.payload[1])],
    ),
    "stale_descale": (
        {"descales_per": "page", "page_size": 72, "causal": False, **FP8},
        [lambda s, w=w, by=by: beside_transitions(s, w, by) for w in "kv" for by in (1, -1)],  # type: ignore[misc]
    ),
    "descale_head": (
        {**FP8, "descales_per": "head"},
        [lambda s: of_other_heads(s, "k"), lambda s: of_other_heads(s, "v")],
    ),
    "descale_slot": (
        {**FP8, "descales_per": "token"},
        [lambda s, w=w, at=at: of_slot_before(s, w, at) for w in "kv" for at in PLACES.values()],  # type: ignore[misc]
    ),
    "encoding": (
        FNUZ,
        [lambda s, w=w, read=read: read(s, w) for w in "kv" for read in (doubled, as_e5m2)],  # type: ignore[misc]
    ),
    "q_descale": (
        {"q_dtype": "fp8_e5m2"},
        [lambda s: attended(s.inputs, q=s.inputs.q / s.batch.q_descale)],
    ),
    "output_scale": (
        {"out_dtype": "fp8_e4m3"},
        [lambda s: (attended(s.inputs)[0] * s.batch.output_scale, None)],
    ),
    "softmax_scale": ({}, [lambda s: attended(s.inputs, softmax_scale=s.inputs.softmax_scale * 1.02)]),
    "gqa_mapping": ({}, [by_modulo]),
    "sink": (
        {"sinks": True},
        [
            lambda s: attended(s.inputs, sinks=None),
            lambda s: attended(s.inputs, sinks=s.inputs.sinks.double() + math.log(2)),  # type: ignore[union-attr]
        ],
    ),
    "soft_cap": ({"logits_soft_cap": 30.0}, [lambda s: attended(s.inputs, logits_soft_cap=None)]),
    "alibi": ({"alibi": True}, [lambda s: attended(s.inputs, alibi_slopes=None)]),
    "head_dim_tail": ({}, [tail_of_k, tail_of_v]),
    "split_weight": (SPLITS, [lambda s, tile=tile: even_splits(s, tile) for tile in SPLIT_TILES]),  # type: ignore[misc]
}


@pytest.mark.parametrize("seq_len", [19, 20, 21])
def test_a_window_edge_among_the_sink_tokens_is_no_edge(seq_len: int) -> None:
    """The window of 16 and 4 sink tokens overlap, meet, or leave one key out."""
    staged = stage(make(rows=Rows("decode", (1,), (seq_len - 1,)), sliding_window=16, sink_tokens=4))
    edges, dropped = staged.effect("window_edges"), staged.effect("sink_tokens")
    assert (edges.size is None) == (seq_len == 19)
    assert edges.size is None or edges.size > MARGIN
    assert dropped.size is not None
    assert dropped.size > MARGIN


def test_every_fault_of_a_matrix_has_a_model_and_every_model_a_test() -> None:
    assert list(FAULT_MODELS) == list(FAULTS)
    assert set(EMULATED) == set(FAULTS)


@pytest.mark.parametrize("fault", EMULATED)
def test_the_effect_is_that_of_a_kernel_with_the_fault(fault: str) -> None:
    axes, kernels = EMULATED[fault]
    staged = stage(make(**axes))
    want = min(staged.true_effect(kernel(staged)) for kernel in kernels)
    assert want > 0
    assert staged.effect(fault).size == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("fault", EMULATED)
def test_a_case_that_sees_and_one_that_cannot(fault: str) -> None:
    axes, _ = EMULATED[fault]
    case = make(**axes)
    contract = KERNELS[case.kernel]
    assert observe_case(case, contract, Demand((fault,)), "cpu").unseen == ()
    quantised = case.kv_dtype != "auto" or case.q_dtype != "auto"
    tiny = replace(case, data="tiny", descales="one" if quantised else "loud")
    blind = observe_case(tiny, contract, Demand((fault,), legacy=(1e-3, 0.0)), "cpu")
    assert [effect.fault for effect in blind.unseen] == [fault]
    assert blind.facts


@pytest.mark.parametrize(
    ("fault", "axes"),
    [
        ("mean_v", {"data": "uniform"}),
        ("softmax_scale", {"data": "uniform"}),
        ("k_descale", {"data": "uniform", **FP8}),
        ("scale_dropped", {"descales": "one", **FP8}),
        ("stale_descale", {"descales_per": "page", "data": "uniform", **FP8}),
        ("descale_head", {"descales_per": "head", "descales": "equal", **FP8}),
        ("descale_slot", {"descales_per": "token", "descales": "equal", **FP8}),
        ("encoding", {"data": "uniform", **FP8}),
        ("q_descale", {"data": "uniform", "q_dtype": "fp8_e4m3"}),
        ("v_descale", {"dtype": "bf16", "data": "uniform", "rows": DECODE, **FP8}),  # an eighth of the mass on a page
        ("page_swap", {"data": "needle", "page_size": 1, "rows": DECODE}),  # four needles, 150 pages
    ],
)
def test_blind_by_tolerances_of_our_own(fault: str, axes: dict[str, Any]) -> None:
    case = make(**axes)
    found = observe_case(case, KERNELS[case.kernel], Demand((fault,)), "cpu")
    assert [effect.fault for effect in found.unseen] == [fault]


ONE = Rows("one", (1,), (9,))


@pytest.mark.parametrize(
    ("fault", "axes", "because"),
    [
        ("window_edges", {}, "no window"),
        ("window_edges", {"sliding_window": 400}, "every sequence fits in the window"),
        ("causal_edge", {"causal": False}, "no causal mask"),
        ("page_swap", {"rows": ONE}, "no sequence has two cached pages"),
        ("k_descale", {}, "the cache stores the dtype of the case: no descale"),
        ("v_descale", {"kernel": "prefix_prefill", "rows": Rows("new", (9,), (0,)), **FP8}, "no token is in the cache"),
        ("stale_descale", FP8, "descales are not by page"),
        ("stale_descale", {"rows": ONE, "descales_per": "page", **FP8}, "no sequence has two cached pages"),
        ("descale_head", FP8, "one descale for all heads"),
        ("descale_head", {"gqa_ratio": 4, "descales_per": "page", **FP8}, "one KV head"),
        ("descale_slot", {"descales_per": "page", **FP8}, "tokens have no descales of their own"),
        ("encoding", {}, "the cache stores the dtype of the case: no descale"),
        ("q_descale", FP8, "q has the dtype of the case"),
        ("output_scale", FP8, "the output has the dtype of the case"),
        ("gqa_mapping", {"gqa_ratio": 1}, "one query head per KV head"),
        ("gqa_mapping", {"gqa_ratio": 4}, "one KV head"),
        ("sink", {}, "no sinks"),
        ("soft_cap", {}, "no soft cap"),
        ("alibi", {}, "no ALiBi"),
        ("head_dim_tail", {"head_size": 64}, "head sizes are powers of two"),
        ("split_weight", {}, "the path without split-KV"),
        ("split_weight", {"num_splits": 1}, "one split"),
        ("split_weight", {"num_splits": 2, "rows": ONE}, "one split has all keys"),
        (
            "split_weight",
            {"num_splits": 2, "rows": DECODE, "sliding_window": 4},
            "no sequence of the batch can have it",
        ),
    ],
)
def test_faults_that_a_case_cannot_have_are_excused_with_the_reason(
    fault: str, axes: dict[str, Any], because: str
) -> None:
    effect = stage(make(**axes)).effect(fault)
    assert effect.size is None
    assert effect.because == because
    assert effect.seen(MARGIN)


def test_of_a_fault_with_a_size_of_its_own_certainty_is_enough() -> None:
    assert not Effect("newest_token", 7.9).seen(MARGIN)
    assert Effect("newest_token", 8.0).seen(MARGIN)
    assert Effect("v_descale", CERTAIN).seen(MARGIN)
    assert not Effect("v_descale", 1.9).seen(MARGIN)
    assert not Effect("newest_token", math.nan).seen(MARGIN)


@pytest.mark.parametrize("fault", ["newest_token", "softmax_scale", "gqa_mapping", "mean_v"])
def test_a_sample_can_only_understate(fault: str) -> None:
    staged = stage(make(rows=Rows("long", (90, 1), (20, 33)), num_q_heads=24, gqa_ratio=3))
    found = list(scenes(staged.batch))
    assert max(len(scene.positions) for scene in found) <= MAX_ROWS
    assert max(len(scene.q_heads) for scene in found) < 24
    _, kernels = EMULATED[fault]
    true = min(staged.true_effect(kernel(staged)) for kernel in kernels)
    size = staged.effect(fault).size
    assert size is not None
    assert MARGIN < size <= true * (1 + 1e-9)


@pytest.mark.parametrize(
    ("k", "v", "faults"),
    [
        ([0.5], [0.25], []),
        ([1.0], [0.25], ["k_descale"]),
        ([1.0], [1.0], ["k_descale", "v_descale"]),
        ([0.5], [0.5], ["descales_exchanged"]),
        ([0.5, 1.0], [0.25, 2.0], []),  # per page
        ([0.5, 1.0], [1.0, 1.0], ["v_descale"]),
    ],
)
def test_descales_that_no_output_can_show(k: list[float], v: list[float], faults: list[str]) -> None:
    descales: dict[str, Any] = {"descales": torch.tensor([k, v]).T[:, None], "law": "loud", "q_descale": None}
    found = blind_to(kv_dtype="fp8_e4m3", **descales, pages=[[7, 2], [4]])
    assert [blindness.fault for blindness in found] == faults
    assert blind_to(kv_dtype="auto", **descales, pages=[[7, 2], [4]]) == ()
    (identity,) = blind_to(kv_dtype="auto", **descales, pages=[[0, 1], [2]])
    assert identity.fault == "page_mapping"
