"""Laws that make one kind of fault loud keep their promise on what kernels read back, and `normal` does not."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from harness.case import Case, Placement, Rows
from harness.errors import LawError
from harness.problem.bar_codes import code_groups, code_values
from harness.problem.problem import Problem, build_problem
from harness.problem.spans import pick_targets, spans
from tests.problem.test_laws import BASE, rows_of

LONG = Rows("long", (3, 1, 20), (200, 900, 0))
VARIANTS: dict[str, dict[str, object]] = {
    "plain": {},
    "window": {"sliding_window": 70},
    "sinks, soft cap": {"sinks": True, "logits_soft_cap": 30.0},
    "fp8 e4m3": {"kv_dtype": "fp8_e4m3"},
    "fp8 e5m2, loud descales": {"kv_dtype": "fp8_e5m2", "descales_per": "page", "dtype": "bf16"},
    "head 128": {"head_size": 128, "gqa_ratio": 1},
    "shared prefix": {"placement": Placement("shared_prefix", "shared")},
}


def changes(problem: Problem, tile: int) -> tuple[int, int]:
    """Tiles of keys after the first, over all queries; and how many of them raise the running maximum of scores."""
    tiles = raised = 0
    for scores, seen, _ in rows_of(problem):
        for token in range(len(seen)):
            keys = seen[token].nonzero()[:, 0]
            whole = len(keys) // tile
            if whole < 2:
                continue
            # whole tiles up to the newest key: what is left over comes first
            peaks = scores[token][:, keys[len(keys) - whole * tile :]].unflatten(1, (whole, tile)).amax(dim=2)
            highest = peaks.cummax(dim=1).values
            tiles += peaks[:, 1:].numel()
            raised += int((peaks[:, 1:] > highest[:, :-1]).sum())
    return tiles, raised


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_running_maximum_rises_at_every_tile_or_never(variant: str) -> None:
    case = replace(BASE, rows=LONG, **VARIANTS[variant])  # type: ignore[arg-type]
    for tile in (16, 64):
        tiles, raised = changes(build_problem(replace(case, data="rising"), "cpu"), tile)
        assert raised == tiles if tile == 64 else raised > 0.99 * tiles  # fp8 rounds whole pages alike
        tiles, raised = changes(build_problem(replace(case, data="falling"), "cpu"), tile)
        assert raised == 0
        tiles, raised = changes(build_problem(replace(case, data="normal"), "cpu"), tile)
        assert tiles == 0 or 0 < raised < tiles


@pytest.mark.parametrize("data", ["rising", "falling"])
def test_ramps_are_no_needles(data: str) -> None:
    problem = build_problem(replace(BASE, rows=LONG, data=data), "cpu")
    for scores, seen, _ in rows_of(problem):
        masses = scores.masked_fill(~seen[:, None, :], -torch.inf).softmax(dim=2)
        top = masses.amax(dim=2)[seen.sum(dim=1) > 15]
        assert float(top.median()) < 0.5


@pytest.mark.parametrize("variant", ["plain", "window", "fp8 e4m3", "fp8 e5m2, loud descales", "head 128"])
def test_large_scores_overflow_exp_and_spread(variant: str) -> None:
    def lowest_and_spread(problem: Problem) -> tuple[float, float]:
        seen_scores = torch.cat([s[seen[:, None, :].expand_as(s)] for s, seen, _ in rows_of(problem)])
        return float(seen_scores.min()), float(seen_scores.std())

    case = replace(BASE, rows=LONG, **VARIANTS[variant])  # type: ignore[arg-type]
    lowest, spread = lowest_and_spread(build_problem(replace(case, data="large"), "cpu"))
    assert lowest > 89
    assert 3 < spread < 20
    assert lowest_and_spread(build_problem(replace(case, data="normal"), "cpu"))[0] < 0


def test_what_large_and_the_others_refuse() -> None:
    with pytest.raises(LawError, match="large: a soft cap of 50 holds scores at 49, below 88"):
        build_problem(replace(BASE, data="large", logits_soft_cap=50.0), "cpu")
    for data in ("large", "falling", "bar_codes"):
        with pytest.raises(LawError, match=f"{data}: ALiBi lowers"):
            build_problem(replace(BASE, data=data, alibi=True), "cpu")
    with pytest.raises(LawError, match="needle_edges: a soft cap of 30"):
        build_problem(replace(BASE, data="needle_edges", logits_soft_cap=30.0), "cpu")


def test_biased_values_have_mean_one_and_tiny_ones_are_tiny() -> None:
    biased = build_problem(replace(BASE, data="biased"), "cpu")
    assert 0.95 < float(biased.v.float().mean()) < 1.05
    assert 0.9 < float(biased.v.float().std()) < 1.1
    assert abs(float(biased.k.float().mean())) < 0.05
    tiny = build_problem(replace(BASE, data="tiny", dtype="fp32"), "cpu")
    for tensor in (tiny.q, tiny.k, tiny.v):
        assert 0.00099 < float(tensor.abs().max()) <= 0.001
        assert abs(float(tensor.mean())) < 2e-5


def test_codes_tell_every_page_slot_sequence_and_head_apart() -> None:
    case = replace(BASE, data="bar_codes", head_size_v=64, rows=Rows("r", (1, 2, 40), (0, 70, 100)))
    values, groups = code_values(case, "cpu"), code_groups(64)
    assert (groups.page, groups.slot, groups.seq, groups.head) == (32, 16, 8, 8)
    for part in groups.starts().values():
        assert bool((values[:, :, part].sum(dim=2) == 1).all())
    assert len(values.flatten(0, 1).unique(dim=0)) == len(values) * case.num_kv_heads  # pages, slots and heads fit
    problem = build_problem(case, "cpu")
    assert torch.equal(problem.v.float(), values)
    assert not bool(problem.q.any())
    for dim in range(1, 16):  # small heads keep what fits
        small = code_groups(dim)
        assert small.page >= 1
        assert small.page + small.slot + small.seq + small.head <= dim


def edges_within(case: Case, step: int, first: int, end: int) -> list[int]:
    return [edge for edge in range(step, case.rows.seq_lens[0], step) if first < edge < end]


@pytest.mark.parametrize(("window", "num_splits"), [*itertools.product([None, 300], [None, 3])])
def test_needles_lie_on_both_sides_of_every_edge(window: int | None, num_splits: int | None) -> None:
    case = replace(
        BASE, data="needle_edges", rows=Rows("one", (200,), (300,)), sliding_window=window, num_splits=num_splits
    )
    (span,) = spans(case.rows, torch.device("cpu"))
    target, seen = pick_targets(case, span)
    pos = span.query_pos[:, None].expand_as(target)
    oldest = (pos - (window or 1000) + 1).clamp(min=0)
    assert bool(seen.all())
    assert bool(((target <= pos) & (target >= oldest)).all())
    for place in (pos, oldest, pos // 16 * 16, pos // 16 * 16 - 1):
        assert int((target == place).sum()) > 50
    hit = set(target.flatten().tolist())
    for step in (16, 64, 128):
        for edge in edges_within(case, step, 0, 500):
            assert {edge - 1, edge} <= hit, (step, edge)
    splits = num_splits or 2
    for tile in (1, 16, 32, 64, 128):
        edge = math.ceil(math.ceil(500 / tile) / splits) * tile
        assert {edge - 1, edge} <= hit, (tile, edge)


def test_few_heads_see_every_kind_of_edge_over_the_seeds() -> None:
    case = replace(BASE, data="needle_edges", rows=Rows("one", (1,), (300,)), num_q_heads=2, gqa_ratio=1)
    hit: set[int] = set()
    for seed in range(60):
        seeded = replace(case, data_seed=seed)
        (span,) = spans(case.rows, torch.device("cpu"))
        hit |= set(pick_targets(seeded, span)[0].flatten().tolist())
    assert hit >= {0, 300, 288, 287, 63, 64, 127, 128}


def test_probe_and_needle_have_the_targets_they_had() -> None:
    """The turns of `needle_edges` are its own."""
    span = next(spans(BASE.rows, torch.device("cpu")))
    needle, edges = (pick_targets(replace(BASE, data=data), span)[0] for data in ("needle", "needle_edges"))
    assert torch.equal(needle, pick_targets(replace(BASE, data="probe"), span)[0])
    assert not torch.equal(needle, edges)
