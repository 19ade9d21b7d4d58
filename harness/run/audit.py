"""Audit: how well the cases of matrices see the faults their matrix lists, without launching any kernel.

Invariant: what the audit calls blind is BLIND in a run of the same case, and the other way round, but for matrices with
a `legacy_tolerance`, which the audit alone measures with.
"""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from harness.case import Case
from harness.errors import LawError, PlacementError
from harness.kernel.contract import Contract
from harness.kernel.registry import find_kernels, writers_of
from harness.matrix.axes import case_id
from harness.matrix.loading import load
from harness.oracle.matched_filter import least_gains
from harness.oracle.observability import wanted
from harness.problem.admission import AUTO
from harness.problem.problem import build_problem
from harness.run.judge_gains import page_filter
from harness.run.observe import Demand, advise, cheapest_laws, choose_law, observe_setup
from harness.run.plant import NO_PLANT
from harness.run.reference import reference_inputs
from harness.run.serving import effects_of, make_engine
from harness.run.setup import Setup, build_arguments
from harness.store.plain import plain_dict
from references.attention import AttentionInputs


@dataclass(frozen=True)
class Job:
    """One case to look at."""

    case: Case
    contract: Contract
    demand: Demand
    device: str = "cpu"


@dataclass(frozen=True)
class AuditRow:
    """What one case shows. `margins` are effects in units of tolerance, None where the case cannot have the fault."""

    matrix: str
    id: str
    law: str  # the data law; the one taken, for `auto`
    wanted: dict[str, float]  # the least effect by which each fault counts as seen
    margins: dict[str, float | None]
    unseen: dict[str, float]
    laws: dict[str, str]  # the cheapest law that shows each fault that is not seen; faults no law shows are left out
    facts: tuple[str, ...] = ()
    advice: str = ""
    least_descale_error: dict[str, float] | None = None  # of K, V on one page: what tier 2 sees, relative, where it can

    @property
    def blind(self) -> bool:
        return bool(self.unseen)

    def to_data(self) -> dict[str, Any]:
        return plain_dict(asdict(self))


def jobs(paths: Iterable[Path], kernels: Mapping[str, Contract], tier: str, device: str = "cpu") -> Iterator[Job]:
    """The cases of `tier` that their kernel supports. Raises MatrixError."""
    for path in paths:
        matrix = load(path, kernel_names=kernels, writer_names=writers_of(kernels))
        demand = Demand(matrix.must_see, matrix.margin, matrix.legacy_tolerance)
        for case in matrix.expand(tier, supported=lambda case: kernels[case.kernel].unsupported(case)).cases:
            if demand.must_see and kernels[case.kernel].unsupported(case) is None:
                yield Job(case, kernels[case.kernel], demand, device)


def audit(work: Sequence[Job], folders: Sequence[Path] = (), workers: int = 1) -> Iterator[AuditRow]:
    """The rows of `work`, in its order, as they come, by `workers` processes (on a GPU: one, as they would share it).

    `folders` hold kernels beside those in the tree: a contract is code, which every process finds for itself.
    """
    if workers == 1:
        yield from map(audit_case, work)
        return
    context = multiprocessing.get_context("spawn")
    plain = [(job.case, job.demand, job.device) for job in work]
    with ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(partial(_audit_elsewhere, tuple(folders)), plain)


def _audit_elsewhere(folders: tuple[Path, ...], asked: tuple[Case, Demand, str]) -> AuditRow:
    case, demand, device = asked
    return audit_case(Job(case, find_kernels(folders)[case.kernel], demand, device))


def audit_case(job: Job) -> AuditRow:
    """What the case of `job` shows of its demand. A case that cannot be built sees nothing, and says why."""
    contract, demand = job.contract.rounding_as(job.case), job.demand
    case = replace(job.case, pool="aliased") if job.case.pool == "dense" else job.case  # no kernel will touch it
    least_wanted = {fault: wanted(fault, demand.margin) for fault in demand.must_see}
    try:
        if case.data == AUTO:
            case = choose_law(case, contract, demand, job.device).taken.case
        if case.steps > 1:
            return _audit_engine(case, job, least_wanted)
        problem = build_problem(case, job.device)
        contract = contract.of_output(case.out_dtype, problem.output_scale)
        setup = build_arguments(problem, contract)
        inputs = reference_inputs(setup.problem, setup.cache, contract)
        found = observe_setup(setup, inputs, contract, demand)
    except (LawError, PlacementError) as error:
        nothing = dict.fromkeys(demand.must_see, 0.0)
        margins: dict[str, float | None] = {**nothing}
        return AuditRow(case.matrix, case_id(case), case.data, least_wanted, margins, nothing, {}, (str(error),))
    least = least_descale_error(setup, inputs, contract)
    del setup, inputs  # before other laws are tried: memory of a case at a time
    laws = cheapest_laws(found, contract, demand, job.device)
    return AuditRow(
        matrix=case.matrix,
        id=case_id(job.case),
        law=case.data,
        wanted=least_wanted,
        margins={effect.fault: effect.size for effect in found.effects},
        unseen={effect.fault: effect.size or 0.0 for effect in found.unseen},
        laws=laws,
        facts=found.facts,
        advice=advise(found, laws),
        least_descale_error=least,
    )


def _audit_engine(case: Case, job: Job, least_wanted: dict[str, float]) -> AuditRow:
    """What the steps of an engine show, each fault the one that shows it. Raises as build_problem."""
    engine = make_engine(case, job.contract, NO_PLANT, torch.device(job.device), checked=True)
    margins = effects_of(engine, job.demand)
    unseen = {fault: size for fault, size in margins.items() if size is not None and size < least_wanted[fault]}
    return AuditRow(case.matrix, case_id(job.case), case.data, least_wanted, margins, unseen, {})


def least_descale_error(setup: Setup, inputs: AttentionInputs, contract: Contract) -> dict[str, float] | None:
    """Smallest relative error of the K and V descale of one page that tier 2 sees, the median over pages.

    Of the first KV head, which stands for all. None where nothing is quantised, where tier 2 does not apply, and where
    it sees no page at all.
    """
    if setup.problem.case.kv_dtype == "auto" or setup.problem.structured:
        return None
    least = least_gains(_first_kv_head(inputs), page_filter(contract, setup))
    found = {"K": least.least_k, "V": least.least_v}
    return found if all(math.isfinite(error) for error in found.values()) else None


def _first_kv_head(inputs: AttentionInputs) -> AttentionInputs:
    group = slice(inputs.q.shape[1] // inputs.k.shape[1])
    return replace(
        inputs,
        q=inputs.q[:, group],
        k=inputs.k[:, :1],
        v=inputs.v[:, :1],
        alibi_slopes=None if inputs.alibi_slopes is None else inputs.alibi_slopes[group],
        sinks=None if inputs.sinks is None else inputs.sinks[group],
        q_cached=None if inputs.q_cached is None else inputs.q_cached[:, group],
        weight_scale=None if inputs.weight_scale is None else inputs.weight_scale[:, :1],
    )
