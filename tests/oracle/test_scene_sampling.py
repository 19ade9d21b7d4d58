"""What is looked at for the effects of faults: the loud heads wherever they are, at a bounded cost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from harness.case import Case, Rows
from harness.kernel.registry import find_kernels
from harness.oracle import scene_sampling
from harness.oracle.faults import FAULT_MODELS
from harness.oracle.observability import MARGIN, known_tolerance, observe, sampled_tolerance
from harness.oracle.scene import Batch, Scene
from harness.oracle.scene_sampling import MAX_HEADS, loudest_heads, scenes
from harness.oracle.tolerance import tolerance
from harness.problem.problem import build_problem
from harness.run.observe import Demand, batch_of, observe_case
from harness.run.reference import build_reference, reference_inputs
from harness.run.setup import build_arguments
from tests.references.test_memory import LiveBytes

KERNELS = find_kernels()
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
NUM_HEADS = 64
BY_NUMBER = (0, 1, 9, 18, 27, 36, 45, 63)  # a sample by number: in step with the turns that a law of nine kinds takes
LONG = Rows("long", (5, 1), (3, 2000))


def make(rows: Rows = LONG, **axes: Any) -> Case:
    defaults = {"num_q_heads": NUM_HEADS, "gqa_ratio": 1, "head_size": 24, "dtype": "fp16", "page_size": 32}
    return Case(matrix="m", kernel="unified_paged", rows=rows, **(defaults | axes))


def built(case: Case, device: str = "cpu") -> Batch:
    contract = KERNELS[case.kernel]
    setup = build_arguments(build_problem(case, device), contract)
    return batch_of(setup, reference_inputs(setup.problem, setup.cache, contract), contract)


def shown(batch: Batch, fault: str) -> float:
    """Effect of the weakest variant of `fault`, LSE apart."""
    contract = KERNELS[batch.case.kernel]
    allowed = sampled_tolerance(contract.numerics, structured=False)
    return observe(batch, contract.content, allowed, [fault], with_lse=False)[0].size or 0.0


def of_heads(batch: Batch, heads: tuple[int, ...]) -> Batch:
    """`heads` alone, each with a KV head of its own."""
    own, kv_heads = list(heads), [head // batch.case.gqa_ratio for head in heads]
    q, k, v = batch.inputs.q[:, own], batch.inputs.k[:, kv_heads], batch.inputs.v[:, kv_heads]
    case = replace(batch.case, num_q_heads=len(heads), gqa_ratio=1)
    return replace(batch, case=case, inputs=replace(batch.inputs, q=q, k=k, v=v))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gqa_ratio", [1, NUM_HEADS])
def test_a_decode_row_of_many_heads_shows_the_newest_token_that_a_sample_by_number_misses(
    gqa_ratio: int, device: str
) -> None:
    batch = built(make(data="probe", gqa_ratio=gqa_ratio), device)
    assert shown(of_heads(batch, BY_NUMBER), "newest_token") < MARGIN
    assert shown(batch, "newest_token") > 100 * MARGIN


PLANTED = {"newest": -1, "first page": 3, "middle page": 32 * 31 + 5, "oldest": 2001 - 700}


@pytest.mark.parametrize("head", [7, 42])
@pytest.mark.parametrize(("place", "key"), PLANTED.items(), ids=PLANTED.keys())
@pytest.mark.parametrize("gqa_ratio", [1, 8, NUM_HEADS])
def test_the_only_loud_head_is_found(place: str, key: int, head: int, gqa_ratio: int) -> None:
    """All heads but one attend alike to everything; that one attends to a single key where faults strike."""
    window = 700 if place == "oldest" else None
    case = make(Rows("one", (1,), (2000,)), data="uniform", gqa_ratio=gqa_ratio, sliding_window=window)
    batch = built(case)
    target = batch.inputs.k[key, head // gqa_ratio]  # [head_size]
    q = batch.inputs.q.clone()
    q[0, head] = (12 * target / (target.square().sum() * batch.inputs.softmax_scale)).to(q.dtype)
    loud = replace(batch, inputs=replace(batch.inputs, q=q))
    (scene,) = scenes(loud)
    assert head in scene.q_heads
    assert len(scene.q_heads) <= MAX_HEADS
    fault = {"newest": "newest_token", "oldest": "window_edges"}.get(place, "page_swap")
    change = FAULT_MODELS[fault].variants
    label = {"newest": "in decode rows", "oldest": "one key less"}.get(place, place)
    for heads, found in ((scene.q_heads, True), (tuple(h for h in scene.q_heads if h != head), False)):
        changed = change[label](whole(loud).of_heads(heads))
        assert changed is not None
        right = whole(loud).of_heads(heads).right.out
        assert (float((changed.outcome().out - right).abs().max()) > 0.5) is found  # type: ignore[union-attr]


def whole(batch: Batch) -> Scene:
    """The scene of every head of the only sequence of `batch`."""
    return scene_sampling._scene(batch, 0, 0, 0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "axes",
    [
        {"sliding_window": 40},
        {"alibi": True, "sinks": True},
        {"causal": False, "sliding_window": 40},
        {"kv_dtype": "fp8_e4m3", "logits_soft_cap": 30.0, "gqa_ratio": 4},
        {"rows": Rows("no_key", (4, 1, 60), (-2, -1, 20)), "sinks": True},
    ],
    ids=str,
)
def test_a_sample_has_the_tolerance_of_the_whole(axes: dict[str, Any], device: str) -> None:
    case = make(**({"rows": Rows("mixed", (90, 1), (60, 150)), "num_q_heads": 16, "data": "probe"} | axes))
    contract = KERNELS[case.kernel]
    setup = build_arguments(build_problem(case, device), contract)
    reference = build_reference(setup.problem, setup.cache, contract)
    known = known_tolerance(tolerance(reference, contract.numerics, case.dtype, case.head_size))
    alone = sampled_tolerance(contract.numerics, structured=False)
    for scene in scenes(built(case, device)):
        for of_all, of_sample in ((known(scene).out, alone(scene).out), (known(scene).lse, alone(scene).lse)):
            ratio = of_sample / of_all.where(of_all > 0, 1.0)
            assert bool((ratio[of_all > 0] > 0.97).all())
            assert bool((ratio < 1.03).all())


def test_temporaries_stay_within_the_stated_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(Rows("mixed", (40, 1), (460, 900)), data="probe", gqa_ratio=16, kv_dtype="fp8_e4m3")
    faults = ["newest_token", "page_swap", "k_descale", "scale_dropped", "softmax_scale"]
    contract, batch = KERNELS[case.kernel], built(case)
    allowed = sampled_tolerance(contract.numerics, structured=False)

    def effects() -> dict[str, float | None]:
        found = observe(batch, contract.content, allowed, faults, with_lse=True)
        return {effect.fault: effect.size for effect in found}

    at_once, parts = effects(), len(list(scenes(batch)))
    with LiveBytes() as free:
        [scene.right.out.shape for scene in scenes(batch)]
    monkeypatch.setattr(scene_sampling, "MAX_ELEMENTS", 1 << 17)
    assert len(list(scenes(batch))) > parts
    assert effects() == pytest.approx(at_once, rel=1e-9)
    with LiveBytes() as used:
        [scene.right.out.shape for scene in scenes(batch)]
    assert used.largest <= 8 * (1 << 17) < free.largest


def test_parts_of_a_group_are_looked_at_as_the_whole_is(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = built(make(Rows("one", (1,), (300,)), data="probe", gqa_ratio=16))
    at_once = loudest_heads(whole(batch))
    monkeypatch.setattr(scene_sampling, "MAX_ELEMENTS", 3 * 301 * 24)
    assert loudest_heads(whole(batch)) == at_once


def test_a_truly_blind_case_of_many_heads_stays_blind() -> None:
    case = make(data="uniform")
    found = observe_case(case, KERNELS[case.kernel], Demand(("newest_token", "mean_v")), "cpu")
    assert [effect.fault for effect in found.unseen] == ["newest_token", "mean_v"]
