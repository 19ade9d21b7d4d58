from dataclasses import replace

import pytest
import torch

from harness.cache.build import build_cache
from harness.cache.content import Content
from harness.cache.effective import effective_kv, value_weights
from harness.case import Case, Rows
from harness.problem.problem import build_problem

CASE = Case(
    "m", "k", Rows("r", (4, 1, 1), (30, 20, -1)), num_q_heads=2, head_size=32, dtype="bf16", kv_dtype="fp8_e4m3"
)


@pytest.mark.parametrize(("content", "first", "second"), [("context", 30, 20), ("by_phase", 30, 21), ("all", 34, 21)])
def test_cached_tokens_are_dequantised_and_new_ones_are_raw(content: str, first: int, second: int) -> None:
    problem = build_problem(CASE, "cpu")
    cache = build_cache(problem, Content(content))
    k, v = effective_kv(problem, cache, Content(content))
    weights = value_weights(problem, Content(content))
    for got, payload, scale, raw in (
        (k, cache.key_payload, problem.descale("k"), problem.k),
        (v, cache.value_payload, problem.descale("v"), problem.v),
    ):
        assert got.dtype == torch.float32
        stored = payload.float() * scale
        assert not torch.equal(stored, raw.float())
        assert torch.equal(
            got, torch.cat([stored[:first], raw[first:34], stored[34 : 34 + second], raw[34 + second :]])
        )
    scale = problem.descale("v")[0, 0].expand(2)
    assert weights.shape == (55, 2)
    assert torch.equal(weights[first - 1], scale)
    assert torch.equal(weights[34 + second - 1], scale)
    assert bool((weights[first:34] == 1).all())


def test_a_planted_fault_does_not_move_the_reference() -> None:
    problem = build_problem(CASE, "cpu")
    honest = build_cache(problem, Content.BY_PHASE)
    planted = build_cache(problem, Content.BY_PHASE, cached_lens=(30, 20, 0), poison=0.0)
    assert planted.cached_lens != honest.cached_lens
    for a, b in zip(
        effective_kv(problem, honest, Content.BY_PHASE),
        effective_kv(problem, planted, Content.BY_PHASE),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_without_quantisation_everything_is_the_value_itself() -> None:
    problem = build_problem(replace(CASE, kv_dtype="auto"), "cpu")
    cache = build_cache(problem, Content.BY_PHASE)
    for got, value in zip(effective_kv(problem, cache, Content.BY_PHASE), (problem.k, problem.v), strict=True):
        assert torch.equal(got, value.float())
