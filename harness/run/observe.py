"""What a matrix demands to be seen, what a set-up can show of it, and how a blind case is told.

Invariant: effects come from what a right kernel sees, before anything is launched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from harness.cache.build import demanded_lens
from harness.case import Case
from harness.errors import LawError
from harness.kernel.contract import Contract
from harness.matrix.matrix import FAULTS
from harness.oracle.descale_faults import stale_label
from harness.oracle.faults import FAULT_MODELS
from harness.oracle.observability import (
    MARGIN,
    Allowed,
    Effect,
    fixed_tolerance,
    magnitudes,
    observe,
    sampled_tolerance,
)
from harness.oracle.scene import Batch
from harness.oracle.transitions import stale_sizes
from harness.problem.admission import law_refusal
from harness.problem.problem import build_problem
from harness.run.judge_gains import page_filter
from harness.run.reference import reference_inputs
from harness.run.setup import Setup, build_arguments
from harness.triage.explain import explain_blind
from references.attention import AttentionInputs

LAWS = ("normal", "probe", "negative", "uniform", "outliers")  # what `data: auto` chooses from, the cheapest first


@dataclass(frozen=True)
class Demand:
    """Faults that every case of a matrix must see, and by how many tolerances.

    `legacy` (atol, rtol) stands in for the tolerance of attnreg: how another suite would have seen the same case.
    """

    must_see: tuple[str, ...] = ()
    margin: float = MARGIN
    legacy: tuple[float, float] | None = None

    def unseen(self, effects: Sequence[Effect]) -> tuple[Effect, ...]:
        return tuple(effect for effect in effects if not effect.seen(self.margin))


NO_DEMAND = Demand()


@dataclass(frozen=True)
class Observation:
    """What one case shows of a demand. `facts` say why it does not show the rest."""

    case: Case
    effects: tuple[Effect, ...]
    unseen: tuple[Effect, ...]
    facts: tuple[str, ...]


@dataclass(frozen=True)
class LawChoice:
    """`taken` is of the cheapest law that shows everything, or of the one that shows most.

    `missed` holds the faults that each law tried in vain does not show.
    """

    taken: Observation
    missed: dict[str, tuple[str, ...]]


def observe_setup(
    setup: Setup, inputs: AttentionInputs, contract: Contract, demand: Demand, allowed: Allowed | None = None
) -> Observation:
    """What `setup`, of which a right kernel sees `inputs`, shows of `demand`, by the tolerances `allowed`.

    Unless given, they are what `demand` implies: a reference is computed for the sampled rows and heads, if at all.
    """
    problem, batch = setup.problem, batch_of(setup, inputs, contract)
    if allowed is None:
        sampled = sampled_tolerance(contract.numerics, structured=problem.structured)
        allowed = sampled if demand.legacy is None else fixed_tolerance(*demand.legacy)
    with_lse = contract.returns_lse and demand.legacy is None
    filtered = {}
    if "stale_descale" in demand.must_see and not problem.structured and demand.legacy is None:
        sizes = stale_sizes(inputs, page_filter(contract, setup))
        filtered = {("stale_descale", stale_label(*at)): size for at, size in sizes.items()}
    effects = observe(batch, contract.content, allowed, demand.must_see, with_lse=with_lse, by_filters=filtered)
    unseen = demand.unseen(effects)
    return Observation(problem.case, effects, unseen, _facts(setup, batch, allowed, unseen) if unseen else ())


def batch_of(setup: Setup, inputs: AttentionInputs, contract: Contract) -> Batch:
    """`setup`, of which a right kernel sees `inputs`, as faults look at it."""
    problem, cache = setup.problem, setup.cache
    return Batch(
        case=problem.case,
        inputs=inputs,
        cached_lens=demanded_lens(problem, contract.content),
        key_payload=cache.key_payload,
        value_payload=cache.value_payload,
        k_descale=problem.descale("k"),
        v_descale=problem.descale("v"),
        q_descale=problem.q_descale,
        output_scale=problem.output_scale,
    )


def observe_case(case: Case, contract: Contract, demand: Demand, device: torch.device | str) -> Observation:
    """The same from a case alone, whose data law must not be `auto`.

    Raises LawError or PlacementError where the case cannot be built.
    """
    problem = build_problem(case, device)
    contract = contract.of_output(case.out_dtype, problem.output_scale)
    setup = build_arguments(problem, contract)
    return observe_setup(setup, reference_inputs(setup.problem, setup.cache, contract), contract, demand)


def choose_law(case: Case, contract: Contract, demand: Demand, device: torch.device | str) -> LawChoice:
    """The law of LAWS to run `case` with. Raises LawError or PlacementError where no law can build it."""
    tried: list[Observation] = []
    refused: list[LawError] = []
    for law in LAWS:
        candidate = replace(case, data=law)
        if law_refusal(candidate) is not None:
            continue
        try:
            tried.append(observe_case(candidate, contract, demand, device))
        except LawError as error:
            refused.append(error)
            continue
        if not tried[-1].unseen:
            break
    if not tried:
        raise refused[0]
    taken = min(tried, key=lambda observation: len(observation.unseen))
    return LawChoice(taken, {o.case.data: tuple(e.fault for e in o.unseen) for o in tried if o.unseen})


def explain_unseen(
    found: Observation, contract: Contract, demand: Demand, device: torch.device | str
) -> dict[str, Any]:
    """Explanation of BLIND: the effect of each fault that is not seen, why, and what would show it."""
    sizes = {_named(effect): effect.size or 0.0 for effect in found.unseen}
    return explain_blind(sizes, found.facts, advise(found, cheapest_laws(found, contract, demand, device)))


def cheapest_laws(found: Observation, contract: Contract, demand: Demand, device: torch.device | str) -> dict[str, str]:
    """{fault: the cheapest law that shows it} for what `found` does not; faults that no law shows are left out."""
    shown: dict[str, str] = {}
    left = tuple(effect.fault for effect in found.unseen)
    for law in LAWS:
        candidate = replace(found.case, data=law)
        if not left or law == found.case.data or law_refusal(candidate) is not None:
            continue
        try:
            there = observe_case(candidate, contract, replace(demand, must_see=left), device)
        except LawError:
            continue  # a law that cannot be drawn shows nothing
        still = tuple(effect.fault for effect in there.unseen)
        shown |= {fault: law for fault in left if fault not in still}
        left = still
    return shown


def advise(found: Observation, laws: Mapping[str, str]) -> str:
    """What would show the faults that `found` does not: laws where `laws` knows one, else values of other axes."""
    by_law: dict[str, list[str]] = {}
    by_axis: dict[str, list[str]] = {}
    for fault in (effect.fault for effect in found.unseen):
        if fault in laws:
            by_law.setdefault(f"data: {laws[fault]}", []).append(fault)
        else:
            by_axis.setdefault(FAULT_MODELS[fault].advice, []).append(fault)
    return "; ".join(f"{what} for {', '.join(faults)}" for what, faults in (by_law | by_axis).items())


def _named(effect: Effect) -> str:
    return f"{effect.fault} {effect.variant}".rstrip()


def _facts(setup: Setup, batch: Batch, allowed: Allowed, unseen: Sequence[Effect]) -> tuple[str, ...]:
    """Why faults are not seen, as far as the inputs tell."""
    facts = []
    if any(effect.fault == "output_zero" for effect in unseen):
        largest, granted = magnitudes(batch, allowed)
        facts.append(f"outputs lie within +-{largest:.2g} while the tolerance is {granted:.2g}")
    case = setup.problem.case
    if case.kv_dtype != "auto" and bool((setup.problem.descales == 1).all()):
        facts.append("descales are 1")
    return tuple(facts) or tuple(f"{effect.fault}: {FAULTS[effect.fault]}" for effect in unseen)
