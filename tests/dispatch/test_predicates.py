"""The dispatch rules against the same rules written out as plain booleans, over the whole product of what matters."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace
from itertools import product
from typing import Any

import pytest

from harness.case import Case, Rows
from harness.dispatch.batch_prefill import V3_MACHINE, V3_REQUEST, BatchPrefillFacts
from harness.dispatch.predicate import ALL_HOLD, Clause, Decision, Predicate
from harness.dispatch.rocm import CUSTOM, GFX1X_PAGED_ATTENTION, GFX9_PAGED_ATTENTION, TRITON, DecodeFacts

DECODE_VALUES: dict[str, tuple[Any, ...]] = {
    "arch": ("gfx90a", "gfx942", "gfx950", "gfx908", "gfx1100", "gfx1201", "gfx1030"),
    "enabled": (True, False),
    "dtype": ("fp16", "bf16", "fp32"),
    "kv_dtype": ("auto", "fp8_e4m3"),
    "head_size": (64, 96, 128),
    "page_size": (8, 16, 24, 32),
    "gqa_ratio": (1, 2, 3, 16, 17),
    "max_seq_len": (131_072, 131_073),
    "sliding_window": (0, (-1, -1), 16, (15, 0)),
    "alibi": (False, True),
    "sinks": (False, True),
    "packed": (True, False),
}
V3 = Predicate("batch_prefill", lambda case, platform: None, (*V3_MACHINE, *V3_REQUEST), ("v3",), ("v2",))
V3_VALUES: dict[str, tuple[Any, ...]] = {
    "arch": ("gfx942", "gfx950"),
    "q_dtype": ("bf16", "fp8_e4m3", "fp8_e4m3fnuz", "fp8_e5m2"),
    "k_dtype": ("bf16", "fp8_e4m3"),
    "v_dtype": ("bf16", "fp8_e4m3"),
    "layout": ("linear_nhd", "linear_3d", "vectorized", "vllm_classic", "hnd"),
    "page_size": (1, 16, 32, 1024, 2048),
    "sliding_window": (0, 1, 128),
    "logits_soft_cap": (0.0, 30.0),
    "alibi": (False, True),
    "sinks": (False, True),
    "sink_tokens": (0, 1),
    "descales_per_page": (False, True),
}


def gfx9_takes_custom(f: DecodeFacts) -> bool:
    if f.arch not in ("gfx90a", "gfx942", "gfx950") or not f.enabled or f.sinks or not f.packed:
        return False
    no_window = f.sliding_window == 0 or f.sliding_window == (-1, -1)
    half = f.dtype == "fp16" or f.dtype == "bf16"
    sizes = (f.head_size == 64 or f.head_size == 128) and (f.page_size == 16 or f.page_size == 32)
    return no_window and half and sizes and not f.gqa_ratio > 16 and not f.max_seq_len > 131072


def gfx1x_takes_custom(f: DecodeFacts) -> bool:
    if not f.arch.startswith(("gfx11", "gfx12")) or not f.enabled or f.sinks or not f.packed or f.alibi:
        return False
    no_window = f.sliding_window == 0 or f.sliding_window == (-1, -1)
    half = f.dtype == "fp16" or f.dtype == "bf16"
    sizes = f.head_size == 128 and f.page_size == 16 and f.kv_dtype == "auto"
    return no_window and half and sizes and not (f.gqa_ratio > 16 or f.gqa_ratio < 3) and not f.max_seq_len > 131072


def takes_v3(f: BatchPrefillFacts) -> bool:
    fp8 = all(name.startswith("fp8_e4m3") for name in (f.q_dtype, f.k_dtype, f.v_dtype))
    plain = f.sliding_window == 0 and f.logits_soft_cap == 0 and not (f.alibi or f.sinks or f.sink_tokens)
    linear = f.layout.startswith("linear")
    page = f.page_size == 1024 if f.descales_per_page else f.page_size in (1, 16, 1024)
    return f.arch == "gfx950" and fp8 and plain and linear and page


RULES: dict[str, tuple[Any, ...]] = {
    "gfx9": (GFX9_PAGED_ATTENTION, DecodeFacts, DECODE_VALUES, gfx9_takes_custom),
    "gfx1x": (GFX1X_PAGED_ATTENTION, DecodeFacts, DECODE_VALUES, gfx1x_takes_custom),
    "v3": (V3, BatchPrefillFacts, V3_VALUES, takes_v3),
}


def disagreements(predicate: Predicate[Any], facts_type: type, values: dict[str, tuple[Any, ...]], wanted: Any) -> Any:
    """How many facts of the product are decided otherwise than `wanted`, and how often each branch decides."""
    wrong, taken = 0, Counter[str]()
    for row in product(*values.values()):
        facts = facts_type(*row)
        decision = predicate.decide(facts)
        wrong += (decision.branch == ALL_HOLD) != wanted(facts)
        wrong += (decision.kernels == predicate.kernels) != (decision.branch == ALL_HOLD)
        taken[decision.branch] += 1
    return wrong, taken


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_agrees_with_the_same_rule_written_out_everywhere_and_takes_every_branch(rule: str) -> None:
    predicate, facts_type, values, wanted = RULES[rule]
    assert list(values) == [f.name for f in fields(facts_type)]
    wrong, taken = disagreements(predicate, facts_type, values, wanted)
    assert wrong == 0
    assert set(taken) == {ALL_HOLD, *(clause.name for clause in predicate.clauses)}


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_without_one_of_its_clauses_is_another_rule(rule: str) -> None:
    predicate, facts_type, values, wanted = RULES[rule]
    admitted = next(f for f in (facts_type(*row) for row in product(*values.values())) if wanted(f))
    near = [replace(admitted, **{name: value}) for name, several in values.items() for value in several]
    near += [replace(facts, descales_per_page=True) for facts in near if rule == "v3"]
    for clause in predicate.clauses:
        weaker = replace(predicate, clauses=tuple(c for c in predicate.clauses if c is not clause))
        differs = any((weaker.decide(facts).branch == ALL_HOLD) != wanted(facts) for facts in near)
        assert differs == (clause.name != "page_size_power"), clause.name  # which the sizes imply: it says why


@pytest.mark.parametrize("ratio", range(1, 20))
def test_the_ends_of_the_range_of_gqa_ratios(ratio: int) -> None:
    facts = DecodeFacts("gfx942", True, "bf16", "auto", 128, 16, ratio, 4096, 0, False, False, True)
    assert (GFX9_PAGED_ATTENTION.decide(facts).branch == ALL_HOLD) == (ratio <= 16)
    other = GFX1X_PAGED_ATTENTION.decide(replace(facts, arch="gfx1100"))
    assert (other.branch == ALL_HOLD) == (3 <= ratio <= 16)


def case(**values: Any) -> Case:
    rows = values.pop("rows", Rows("mixed", (16, 1), (16, 200)))
    return Case(matrix="m", kernel="k", rows=rows, **values)


def test_the_facts_of_a_case_lead_to_the_kernel_that_the_engine_would_take() -> None:
    decide = GFX9_PAGED_ATTENTION.of
    assert decide(case(), "gfx942") == Decision((CUSTOM,), ALL_HOLD, "every condition holds")
    for name, values in {
        "window": {"sliding_window": 16}, "dtype": {"dtype": "fp32"}, "sinks": {"sinks": True},
        "page_size_power": {"page_size": 24}, "page_size": {"page_size": 64}, "head_size": {"head_size": 24},
        "gqa_ratio": {"num_q_heads": 34, "gqa_ratio": 17}, "packed": {"strides": "cache"},
        "max_seq_len": {"rows": Rows("long", (1,), (131_072,))},
    }.items():  # fmt: skip
        decision = decide(case(**values), "gfx942")
        assert decision is not None
        assert (decision.kernels, decision.branch) == ((TRITON,), name)


def test_a_batch_without_a_decode_row_does_not_come_before_the_choice() -> None:
    assert GFX9_PAGED_ATTENTION.of(case(rows=Rows("prefill", (16, 2), (0, 3))), "gfx942") is None


def test_clauses_of_the_machine_are_no_branches_that_a_sweep_could_reach() -> None:
    assert "arch" not in GFX9_PAGED_ATTENTION.branches
    assert GFX9_PAGED_ATTENTION.of(case(), "gfx1100") == Decision(
        (TRITON,), "arch", "not one of gfx90a, gfx942, gfx950"
    )


def test_a_predicate_is_refused_where_a_branch_has_no_name_of_its_own_or_leads_nowhere() -> None:
    clause = Clause[Case]("alibi", "ALiBi slopes are given", lambda c: not c.alibi)
    for clauses, otherwise, what in (
        ((clause, clause), ("b",), "two branches are called alibi"),
        ((replace(clause, name=ALL_HOLD),), ("b",), "two branches are called all_hold"),
        ((clause,), (), "no kernels where alibi does not hold"),
    ):
        with pytest.raises(ValueError, match=what):
            Predicate("p", lambda c, _: c, clauses, ("a",), otherwise)
