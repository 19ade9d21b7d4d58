"""Localisation: every planted fault is named with its kind, place and size; what no single fault explains is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from harness.kernel.numerics import NumericsProfile
from harness.oracle import gains
from harness.oracle.gains import Gain
from harness.oracle.localise import find_source
from harness.oracle.matched_filter import find_gains
from references.attention import AttentionInputs
from tests.oracle.cases import judged, make_case
from tests.oracle.emulated_kernel import Schedule, run_emulated
from tests.oracle.test_matched_filter import filter_of

PROFILE = NumericsProfile()
Change = Callable[[AttentionInputs], AttentionInputs]


def located(inputs: AttentionInputs, out: torch.Tensor, lse: torch.Tensor, num_splits: int = 1) -> Gain | None:
    filters = replace(filter_of(inputs, PROFILE, "bf16"), num_splits=num_splits)
    findings = replace(judged(inputs, out, lse, PROFILE, "bf16"), gains=find_gains(inputs, out, filters))
    assert not findings.clean
    return find_source(inputs, out, filters, findings)


def _heads(pick: Callable[[AttentionInputs], Any]) -> Change:
    return lambda i: replace(i, k=i.k[:, pick(i)], v=i.v[:, pick(i)])


def _modulo(inputs: AttentionInputs) -> torch.Tensor:
    return torch.arange(inputs.q.shape[1]) % inputs.k.shape[1]


def _keys(first: int, end: int, factor_k: float, factor_v: float, head: int | slice = slice(None)) -> Change:
    def change(inputs: AttentionInputs) -> AttentionInputs:
        k, v = inputs.k.clone(), inputs.v.clone()
        k[first:end, head] *= factor_k
        v[first:end, head] *= factor_v
        return replace(inputs, k=k, v=v)

    return change


def _stale(key: int) -> Change:
    """One slot holds the values of another token."""

    def change(inputs: AttentionInputs) -> AttentionInputs:
        v = inputs.v.clone()
        v[key] = v[key].flip(-1)
        return replace(inputs, v=v)

    return change


FAULTS: dict[str, tuple[dict[str, Any], Change, dict[str, Any], str, float, dict[str, Any]]] = {
    # features, fault in the inputs, fault in the mask; kind, estimate and place that must be named
    "newest dropped": ({}, lambda i: i, {"dropped_keys": 1}, gains.NEWEST_WEIGHT, -1, {}),
    "window one narrower": (
        {"sliding_window": 37}, lambda i: replace(i, sliding_window=36), {}, gains.OLDEST_WEIGHT, -1, {},
    ),
    "window one wider": (
        {"sliding_window": 37}, lambda i: replace(i, sliding_window=38), {}, gains.BEYOND_OLDEST, 1, {},
    ),
    "sink tokens dropped": (
        {"sliding_window": 37, "sink_tokens": 5}, lambda i: replace(i, sink_tokens=0), {}, gains.SINK_TOKENS, -1, {},
    ),
    "one sink token too many": (
        {"sliding_window": 37, "sink_tokens": 5}, lambda i: replace(i, sink_tokens=6), {}, gains.BEYOND_SINKS, 1, {},
    ),
    "window beside sink tokens one narrower": (
        {"sliding_window": 37, "sink_tokens": 5}, lambda i: replace(i, sliding_window=36), {}, gains.OLDEST_WEIGHT,
        -1, {},
    ),
    "causal off by one": ({}, lambda i: i, {"causal_shift": 1}, gains.BEYOND_NEWEST, 1, {}),
    "causal off by minus one": ({}, lambda i: i, {"causal_shift": -1}, gains.NEWEST_WEIGHT, -1, {}),
    "gqa modulo": ({}, _heads(_modulo), {}, gains.HEAD_MODULO, 1, {}),
    "kv heads swapped": ({}, _heads(lambda i: [1, 0]), {}, gains.HEAD_SHIFT, 1, {"slot": None}),
    "slot read as zeros": ({}, _keys(100, 101, 0, 0), {}, gains.TOKEN_ZERO, 1, {"position": 100, "slot": 6}),
    "stale values": ({}, _stale(100), {}, gains.TOKEN_VALUE, 1, {"position": 100, "slot": 6, "page": 6}),
    "K of one page": ({}, _keys(96, 112, 1.017, 1, 0), {}, gains.K_DESCALE, 0.017, {"slot": 6, "kv_head": 0}),
    "V of one page": ({}, _keys(96, 112, 1, 1.05, 1), {}, gains.V_DESCALE, 0.05, {"slot": 6, "kv_head": 1}),
    "softmax scale": ({}, lambda i: replace(i, softmax_scale=1.02 * i.softmax_scale), {}, gains.K_DESCALE, 0.02,
                      {"slot": None}),
    "V of everything": ({}, lambda i: replace(i, v=1.02 * i.v), {}, gains.V_DESCALE, 0.02, {"slot": None}),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_faults_are_named(fault: str, seed: int) -> None:
    features, change, in_mask, kind, estimate, place = FAULTS[fault]
    inputs = make_case("normal", "bf16", lengths=((48, 1, 20), (300, 257, 20)), seed=seed, **features)
    out, lse = run_emulated(change(inputs), PROFILE, "bf16", **in_mask)
    source = located(inputs, out, lse)
    assert source is not None
    if fault == "newest dropped":  # in a prefill row it is one token of the last query's
        assert source.kind in (gains.NEWEST_WEIGHT, gains.TOKEN_WEIGHT)
        assert source.position in (None, inputs.seq_lens[source.sequence or 0] - 1)
    else:
        assert source.kind == kind
    if kind == gains.HEAD_SHIFT:
        assert source.other_head == 1 - (source.kv_head or 0)
    assert source.estimate == pytest.approx(estimate, rel=0.1)
    assert {name: getattr(source, name) for name in place} == place
    assert source.share is not None
    assert 0.5 < source.share <= 1.001


def _merged(parts: list[torch.Tensor], weights: list[torch.Tensor]) -> torch.Tensor:
    return sum((o * w for o, w in zip(parts, weights, strict=True)), torch.zeros_like(parts[0])) / sum(weights)


@pytest.mark.parametrize(
    ("fault", "kind", "estimate"), [("lost", gains.SPLIT_WEIGHT, -1.0), ("averaged", gains.SPLIT_AVERAGE, 1.0)]
)
def test_splits_are_named(fault: str, kind: str, estimate: float) -> None:
    """Two splits of 128 keys of a decode batch; one is lost, or both get the same weight."""
    inputs = make_case("normal", "bf16", lengths=((1,), (256,)), group=4)
    parts, weights = [], []
    for keys in (slice(0, 128), slice(128, 256)):
        part = replace(inputs, k=inputs.k[keys], v=inputs.v[keys], seq_lens=(128,))
        out, lse = run_emulated(part, NumericsProfile(out_dtype="fp32"), "bf16")
        parts.append(out.double())
        weights.append(lse.double().exp()[..., None])
    if fault == "lost":
        weights[1] = torch.zeros_like(weights[1])
    else:
        weights = [torch.ones_like(weights[0])] * 2
    _, lse = run_emulated(inputs, PROFILE, "bf16")
    source = located(inputs, _merged(parts, weights).to(torch.bfloat16), lse, num_splits=2)
    assert source is not None
    assert (source.kind, source.split) == (kind, 1 if fault == "lost" else None)
    assert source.estimate == pytest.approx(estimate, abs=0.05)


def test_a_row_of_its_own_factor_is_named() -> None:
    inputs = make_case("normal", "bf16", lengths=((48, 20), (300, 20)))
    out, lse = run_emulated(inputs, PROFILE, "bf16", Schedule())
    out[7] *= 1.1
    source = located(inputs, out, lse)
    assert source is not None
    assert (source.kind, source.position, source.sequence) == (gains.ROW_GAIN, 252 + 7, 0)
    assert source.estimate == pytest.approx(0.1, rel=0.1)


def test_noise_has_no_source() -> None:
    """An error that no candidate explains: the output of other queries."""
    inputs = make_case("normal", "bf16", lengths=((48,), (300,)))
    out, lse = run_emulated(replace(inputs, q=inputs.q.flip(0)), PROFILE, "bf16")
    assert located(inputs, out, lse) is None


def test_rows_without_keys_have_no_source() -> None:
    inputs = make_case("normal", "bf16", lengths=((2,), (0,)))
    out, lse = run_emulated(inputs, PROFILE, "bf16")
    assert located(inputs, out + 1, lse) is None
