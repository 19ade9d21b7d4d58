"""An engine, simulated: steps over one cache memory that persists, each with its writer and its attention.

Invariant: before a step, and again after its writer, every byte of the memory is what a cache that is built for this
step holds; so the first step that is wrong is told, and what it does is its own fault. Only pages that change hands are
touched between steps: they are poisoned, so that a page that is read through a stale table shows, whatever it held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from harness.cache.build import KVCache
from harness.cache.page_table import page_ids, table_name
from harness.cache.quantise import bits_of
from harness.case import Case
from harness.errors import SetupBug
from harness.kernel.contract import Contract
from harness.kernel.fences import NO_FENCES, Fences
from harness.oracle.observability import wanted
from harness.problem.problem import Problem, build_problem
from harness.problem.schedule import Schedule, Scheduled, Step, make_schedule
from harness.problem.steps import step_problem
from harness.run.observe import Demand, observe_setup
from harness.run.outcome import Outcome, Verdict
from harness.run.plant import NO_PLANT, Plant
from harness.run.reference import reference_inputs
from harness.run.setup import Setup, build_arguments, check_setup
from harness.triage.explain import explain_blind, explain_setup_bug, with_row

MAX_TOLD = 4  # pages of one step


@dataclass(frozen=True)
class Engine:
    """A case of several steps; `whole` is the problem of all its requests (Schedule.problem_case)."""

    whole: Problem
    schedule: Schedule
    contract: Contract
    plant: Plant
    checked: bool  # whether each set-up is checked before its launches
    fences: Fences = NO_FENCES

    def contract_of(self, step: Case) -> Contract:
        """The contract for the batch of one step, which says what device kernel runs and so how it rounds."""
        return self.contract.rounding_as(step).of_output(step.out_dtype, self.whole.output_scale)

    def setups(self) -> Iterator[tuple[Step, Setup]]:
        """The steps, with the memory that the launches of all steps before have left. Raises SetupBug as it goes."""
        memory: KVCache | None = None
        previous: Setup | None = None
        plant, owners = self.plant, dict[int, int]()
        for step in self.schedule.steps:
            problem = step_problem(self.whole, self.schedule, step)
            due = previous is not None and 2 * step.number > len(self.schedule.steps)
            setup = None
            shown = replace(problem.case, steps=len(self.schedule.steps))
            if due and plant is not NO_PLANT and plant.applies(shown, self.contract.content):
                setup = self._planted(problem, previous)
            plant = plant if setup is None else NO_PLANT
            setup = setup or build_arguments(problem, self.contract_of(problem.case), fences=self.fences)
            assert setup.writing is not None
            fresh = setup.writing.memory
            if memory is not None:
                changed = pages_changed(owners, step.owners)
                if self.contract.window_pages == "dead":  # pages that left the window were given up, too
                    changed += sorted(fresh.dead_pages)
                hand_over(memory, fresh, changed)
                setup = setup.on_memory(memory.k, memory.v)
            memory, owners, previous = fresh if memory is None else memory, step.owners, setup
            yield step, setup

    def _planted(self, problem: Problem, previous: Setup | None) -> Setup | None:
        """The set-up of a step with the fault of the plant in it; None where this step would not show it."""
        assert previous is not None
        setup = build_arguments(problem, self.contract_of(problem.case), self.plant, self.fences)
        args = self.plant.step_arguments(setup.args, previous.args)
        return None if args is None else replace(setup, args=args)


def make_engine(
    case: Case,
    contract: Contract,
    plant: Plant,
    device: torch.device,
    *,
    checked: bool,
    fences: Fences = NO_FENCES,
) -> Engine:
    """The engine of a case of several steps. Raises what build_problem raises."""
    schedule = make_schedule(case)
    whole = plant.problem(build_problem(schedule.problem_case(case), device))
    return Engine(whole, schedule, contract, plant, checked, fences)


def serve(engine: Engine, demand: Demand, launched: Callable[[Contract, Setup], Verdict]) -> Verdict:
    """Run all steps, `launched` doing one; the verdict of the first that fails or, over all of them, of the first
    that is ELEVATED, or PASS.
    """
    schedule = engine.schedule
    if engine.checked and (blind := unseen_by_all(engine, demand)):
        return blind
    passed: list[Verdict] = []
    elevated: Verdict | None = None
    steps = engine.setups()
    for step, setup in steps:
        contract = engine.contract_of(setup.problem.case)
        try:
            if engine.checked:
                check_setup(setup, contract)
        except SetupBug as bug:
            verdict = Verdict(Outcome.TEST_BUG, f"before launch: {bug}", explanation=explain_setup_bug(bug))
            return at_step(verdict, schedule, step, setup)
        verdict = launched(contract, setup)
        if verdict.outcome.is_failure:
            return at_step(verdict, schedule, step, setup)
        if verdict.outcome is Outcome.ELEVATED and elevated is None:
            elevated = at_step(verdict, schedule, step, setup)
        passed.append(verdict)
    return replace(
        elevated or passed[-1],
        ran=tuple(dict.fromkeys(name for verdict in passed for name in verdict.ran)),
        err_over_tol=_largest(passed, "err_over_tol"),
        lse_err_over_tol=_largest(passed, "lse_err_over_tol"),
        z=_largest(passed, "z"),
        tighter_err_over_tol=_largest(passed, "tighter_err_over_tol"),
    )


def _largest(verdicts: list[Verdict], name: str) -> float | None:
    return max((value for one in verdicts if (value := getattr(one, name)) is not None), default=None)


def pages_changed(before: dict[int, int], now: dict[int, int]) -> list[int]:
    """Pages that are another request's than in the step before, or nobody's any more; by owners {page: request}."""
    return sorted(page for page in before.keys() | now.keys() if before.get(page) != now.get(page))


def hand_over(memory: KVCache, fresh: KVCache, pages: list[int]) -> None:
    """Give `pages` of the memory what they hold in `fresh`, where their tokens are yet to be stored."""
    for kept, built in ((memory.k, fresh.k), (memory.v, fresh.v)):
        bits_of(kept)[pages] = bits_of(built)[pages]


def unseen_by_all(engine: Engine, demand: Demand) -> Verdict | None:
    """BLIND where some fault is seen by no step of those that can have it."""
    sizes = effects_of(engine, demand)
    unseen = {f: size for f, size in sizes.items() if size is not None and size < wanted(f, demand.margin)}
    if not unseen:
        return None
    facts = [f"no step of {len(engine.schedule.steps)} shows more"]
    explanation = explain_blind(unseen, facts, "other data, more steps or more heads")
    return Verdict(Outcome.BLIND, explanation["summary"], explanation=explanation)


def effects_of(engine: Engine, demand: Demand) -> dict[str, float | None]:
    """What each fault of `demand` does to the step that shows it first, or most; None where no step can have it."""
    sizes: dict[str, float | None] = dict.fromkeys(demand.must_see)
    left = demand.must_see
    for step in engine.schedule.steps:
        if not left:
            break
        problem = step_problem(engine.whole, engine.schedule, step).without_writer()
        contract = engine.contract_of(problem.case)
        setup = build_arguments(problem, contract)
        inputs = reference_inputs(problem, setup.cache, contract)
        found = observe_setup(setup, inputs, contract, replace(demand, must_see=left)).effects
        for effect in found:
            if effect.size is not None:
                sizes[effect.fault] = max(sizes[effect.fault] or 0.0, effect.size)
        left = tuple(effect.fault for effect in found if effect.size is None or not effect.seen(demand.margin))
    return sizes


def at_step(verdict: Verdict, schedule: Schedule, step: Step, setup: Setup) -> Verdict:
    """`verdict` with the step it is of, its requests, and whose the pages were that it names."""
    place = f"step {step.number} of {len(schedule.steps)}"
    told = [place, *(f"sequence {seq} is {_request(row)}" for seq, row in enumerate(step.rows))]
    found = verdict.explanation or with_row(None, "reason", verdict.reason)
    explanation: dict[str, Any] = with_row(found, "step", *told)
    stale = stale_entries(schedule, step, setup)
    named = [] if stale else [schedule.history(page, step.number) for page in _pages_named(explanation)[:MAX_TOLD]]
    if stale or named:
        explanation = with_row(explanation, "pages", *(stale or named))
    reason = f"{place}: " + "; ".join((*stale[:2], verdict.reason))
    return replace(verdict, reason=reason, explanation={**explanation, "summary": reason})


def _request(row: Scheduled) -> str:
    doing = "decodes" if row.query_len == 1 and row.context_len else "prefill"
    return f"request {row.request}, {doing}: query_len {row.query_len}, context {row.context_len}"


def _pages_named(explanation: dict[str, Any]) -> list[int]:
    """Pages that findings on memory and accesses are about, in their order."""
    found = [one.get("page") for one in (*explanation.get("writes", ()), *explanation.get("accesses", ()))]
    return list(dict.fromkeys(page for page in found if page is not None))


def stale_entries(schedule: Schedule, step: Step, setup: Setup) -> list[str]:
    """Live entries of the page table that was handed over which are not those of this step, in words."""
    size, name = setup.cache.page_size, table_name(setup.args)
    before = schedule.steps[step.number - 2].rows if step.number > 1 else ()
    told, of_before = [], True
    for seq, row in enumerate(step.rows):
        handed = page_ids(setup.args, seq, len(row.pages)).tolist()
        for column, (got, page) in enumerate(zip(handed, row.pages, strict=False)):
            if got == page:
                continue
            of_before &= seq < len(before) and got in before[seq].pages[column : column + 1]
            end = min((column + 1) * size, row.context_len + row.query_len) - 1
            where = f"positions {column * size}..{end} of request {row.request}"
            holder = step.owners.get(got)
            now = "freed" if holder is None else f"reused by request {holder}"
            history = schedule.history(got, step.number)
            told.append(f"stale page: {where} are read from page {got} ({now}) instead of {page}: {history}")
    which = f"{name} is that of step {step.number - 1}"
    return [which] * (of_before and len(told) > 1) + told[:MAX_TOLD]
