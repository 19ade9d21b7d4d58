"""One case, end to end: set-up, checks, reference, launch, judgement. Pure of pytest and of rendering.

Invariant: every case ends in exactly one Verdict. Faults of kernel, set-up and harness are never mixed
up: set-up faults stop before the launch, and only what the launch itself raises or breaks is blamed on the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from harness.cache.effective import effective_kv
from harness.case import Case
from harness.dispatch.stated import fallbacks, refuted
from harness.errors import (
    KernelNotFound,
    KernelRaised,
    LawError,
    OutOfMemory,
    PlacementError,
    SetupBug,
    first_line,
)
from harness.interpreter import prepare
from harness.kernel.contract import Contract
from harness.kernel.failures import memory_shortage
from harness.kernel.fences import NO_FENCES, Fences
from harness.kernel.launch import LaunchResult, launch
from harness.kernel.registry import code_home, load_entry
from harness.matrix.matrix import MustRun
from harness.oracle.findings import AccessFindings
from harness.oracle.finer import finer_tolerance
from harness.oracle.judge import judge
from harness.oracle.name_payload_fault import name_payload_fault
from harness.oracle.observability import blind_to, known_tolerance
from harness.oracle.tolerance import Tolerance, tolerance
from harness.problem.admission import AUTO, NEEDLES
from harness.problem.problem import build_problem
from harness.run.addresses import memory_of, tell_addresses, unreached, unseen_addresses
from harness.run.agreement import with_agreement
from harness.run.device import Stopwatch, context_error, release_memory
from harness.run.judge_access import judge_launch, untraceable
from harness.run.judge_gains import with_gains
from harness.run.judge_writing import through_writer
from harness.run.observe import NO_DEMAND, Demand, batch_of, choose_law, explain_unseen, observe_setup
from harness.run.outcome import Outcome, Verdict
from harness.run.plant import NO_PLANT, Plant
from harness.run.reference import attend_as, reference_inputs
from harness.run.serving import make_engine, serve
from harness.run.setup import Setup, build_arguments, check_setup, mapped
from harness.run.stale import explain_stale
from harness.run.twice import with_second_launch
from harness.run.twin import with_noise_floor
from harness.triage.bar_codes import decode_bar_codes
from harness.triage.explain import explain_mismatch, explain_setup_bug, with_row
from harness.triage.payload import tell_payload_fault
from harness.triage.raised import explain_raised
from references.attention import AttentionInputs, AttentionReference


@dataclass(frozen=True)
class Options:
    """How cases are run, apart from what they are."""

    device: str = "auto"  # auto | cpu | cuda
    contract_checks: bool = True
    plant: Plant = NO_PLANT
    data_seed: int | None = None  # overrides the seeds of the case
    geometry_seed: int | None = None
    demand: Demand = NO_DEMAND  # what the matrix demands to be seen
    access_trace: bool = True  # of interpreted kernels; compiled ones cannot be traced
    fences: Fences = NO_FENCES  # buffers with nothing mapped around them: for processes that may end
    buffer_map: Path | None = None  # where the addresses of the buffers are written before the launch
    twice: bool = False  # launch once more in another order of programs, and compare bits
    twins: tuple[str, ...] = ()  # axes in which a twin of the case must leave the same bits
    noise_floor: str = "off"  # off | report | fail: whether errors are compared with those of a case's twin
    must_run: tuple[MustRun, ...] = ()  # what the matrix states of the device kernels that run


def resolve_device(name: str) -> torch.device:
    """The device to run on; on a CPU Triton must be interpreted, which is decided before Triton is imported."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    prepare(name)
    return torch.device(name)


def run_case(case: Case, contract: Contract, options: Options) -> Verdict:
    """Run `case` on the kernel of `contract` and say what became of it."""
    if clause := contract.unsupported(case):
        return Verdict(Outcome.UNSUPPORTED, clause)
    case = options.plant.case(_reseeded(case, options))
    if why := refuted(case, contract, options.must_run):  # other seeds than the matrix's may draw another batch
        return Verdict(Outcome.TEST_BUG, f"before launch: {why}")
    contract = contract.rounding_as(case) if case.steps == 1 else contract  # of an engine: step by step
    device = resolve_device(options.device)
    watch = Stopwatch(device)
    law = ""
    try:
        if case.data == AUTO:
            with watch.phase("law"):
                case = choose_law(case, contract, options.demand, device).taken.case
            law = case.data
        verdict = _judged(case, contract, options, watch)
    except (LawError, PlacementError) as error:
        verdict = Verdict(Outcome.TEST_BUG, f"this case cannot be built: {error}")
    except OutOfMemory as error:
        verdict = Verdict(Outcome.OUT_OF_MEMORY, str(error), explanation=explain_raised(error, code_home(contract)))
    except (MemoryError, RuntimeError) as error:
        if shortage := memory_shortage(error):
            phase = [*watch.seconds][-1] if watch.seconds else "start"  # it ended in this one
            verdict = Verdict(Outcome.OUT_OF_MEMORY, f"attnreg ran out of {shortage} (in phase {phase})")
        elif isinstance(error, torch.AcceleratorError) or context_error(device):
            verdict = Verdict(Outcome.CRASH, f"the device context died: {first_line(error)}")
        else:
            raise
    if verdict.outcome is not Outcome.CRASH and (died := context_error(device)):
        verdict = Verdict(Outcome.CRASH, f"the device context died: {died}; {verdict.reason}".rstrip("; "))
    if verdict.outcome is not Outcome.CRASH:  # a dead device gives nothing back
        release_memory(device)
    seeds = {"geometry": case.geometry_seed, "data": case.data_seed}
    return replace(verdict, seconds=watch.seconds, seeds=seeds, law=law)


def _reseeded(case: Case, options: Options) -> Case:
    data = case.data_seed if options.data_seed is None else options.data_seed
    geometry = case.geometry_seed if options.geometry_seed is None else options.geometry_seed
    return replace(case, data_seed=data, geometry_seed=geometry)


def _judged(case: Case, contract: Contract, options: Options, watch: Stopwatch) -> Verdict:
    if case.steps > 1:
        with watch.phase("problem"):
            checked, fences = options.contract_checks, options.fences
            engine = make_engine(case, contract, options.plant, watch.device, checked=checked, fences=fences)
        by_step = replace(options, demand=NO_DEMAND)
        return serve(engine, options.demand, lambda own, setup: _seeing(own, setup, by_step, watch))
    try:
        with watch.phase("problem"):
            problem = options.plant.problem(build_problem(case, watch.device))
            contract = contract.of_output(case.out_dtype, problem.output_scale)
        with watch.phase("cache"):
            setup = build_arguments(problem, contract, options.plant, options.fences)
            if options.contract_checks:
                check_setup(setup, contract)
    except SetupBug as bug:
        return Verdict(Outcome.TEST_BUG, f"before launch: {bug}", explanation=explain_setup_bug(bug))
    return _seeing(contract, setup, options, watch)


def _seeing(contract: Contract, setup: Setup, options: Options, watch: Stopwatch) -> Verdict:
    if blind := _blindness(setup):
        return Verdict(Outcome.BLIND, blind, memory=memory_of(setup))
    verdict = _launched(contract, setup, options, watch)
    return replace(verdict, memory=memory_of(setup))


def _blindness(setup: Setup) -> str | None:
    """Why this set-up could not show some fault, or None."""
    problem, cache = setup.problem, setup.cache
    found = blind_to(
        kv_dtype=problem.case.kv_dtype,
        descales=problem.descales,
        law=problem.case.descales,
        q_descale=None if problem.case.q_dtype == "auto" else problem.q_descale,
        pages=cache.pages,
    )
    return "; ".join(f"cannot see {b.fault}: {b.because}" for b in found) or None


def _launched(contract: Contract, setup: Setup, options: Options, watch: Stopwatch) -> Verdict:
    case = setup.problem.case
    try:
        with watch.phase("import"):
            launcher = load_entry(contract)
        with watch.phase("reference"):  # before the launch: a kernel that changes its inputs must not move it
            inputs = reference_inputs(setup.problem, setup.cache, contract)
            reference = attend_as(inputs, setup.problem, contract)
            structured = setup.problem.structured
            allowed = tolerance(reference, contract.numerics, case.dtype, case.head_size, structured=structured)
        if options.contract_checks and (unseen := unseen_addresses(setup, contract, reference, allowed)):
            return Verdict(Outcome.BLIND, unseen)
        if options.contract_checks and options.demand.must_see:
            with watch.phase("observe"):
                seen = observe_setup(setup, inputs, contract, options.demand, known_tolerance(allowed))
            if seen.unseen:
                explanation = explain_unseen(seen, contract, options.demand, watch.device)
                return Verdict(Outcome.BLIND, explanation["summary"], explanation=explanation)
        untraced = untraceable(case, watch.device, asked=options.access_trace)
        if setup.writing is not None:
            with watch.phase("writer"):
                seed = case.geometry_seed
                written = through_writer(setup, program_order_seed=seed, buffer_map=options.buffer_map)
            if isinstance(written, Verdict):
                return written
            setup = written
        if options.buffer_map is not None:
            setup = mapped(setup, options.buffer_map)
        with watch.phase("launch"):
            result = launch(
                contract,
                case,
                launcher,
                setup.args,
                setup.outputs,
                program_order_seed=case.geometry_seed,
                pools=setup.cache.pools_by_argument,
                trace_accesses=untraced is None,
            )
        with watch.phase("access"):
            access = judge_launch(contract, setup, result, untraced)
        with watch.phase("judge"):
            astray = fallbacks(case, contract, options.must_run, result.ran)
            result = replace(result, violations=(*astray, *result.violations))
            verdict = _verdict(contract, setup, inputs, reference, allowed, result, access)
        if options.contract_checks and verdict.outcome is Outcome.PASS and (unseen := unreached(setup)):
            return replace(verdict, outcome=Outcome.BLIND, reason=unseen)
        if options.twice and verdict.outcome is Outcome.PASS:
            with watch.phase("again"):
                seed = case.geometry_seed + 1
                verdict = with_second_launch(verdict, contract, setup, options.plant, launcher, seed=seed)
        if options.twins and verdict.outcome is Outcome.PASS:
            with watch.phase("twins"):
                verdict = with_agreement(verdict, contract, setup, launcher, options.twins)
        if options.noise_floor == "off" or verdict.outcome is not Outcome.PASS:
            return verdict
        with watch.phase("twin"):
            fail = options.noise_floor == "fail"
            return with_noise_floor(verdict, contract, setup, reference, allowed, launcher, fail=fail)
    except KernelNotFound as error:
        return Verdict(Outcome.ERROR, str(error), explanation=with_row(None, "not loaded", str(error)))
    except KernelRaised as error:
        explanation = explain_raised(error, code_home(contract))
        return Verdict(Outcome.FAIL, explanation["summary"], explanation=explanation)


def _verdict(
    contract: Contract,
    setup: Setup,
    inputs: AttentionInputs,
    reference: AttentionReference,
    allowed: Tolerance,
    result: LaunchResult,
    access: AccessFindings,
) -> Verdict:
    case = setup.problem.case
    out, lse = setup.outputs[0], setup.outputs[1] if contract.returns_lse else None
    findings = judge(
        out.tensor,
        lse.tensor if lse else None,
        reference,
        allowed,
        unwritten=tuple(output.unwritten() for output in setup.outputs),
        violations=result.violations,
        exact=case.data in NEEDLES,
    )
    findings = with_gains(replace(findings, access=access), contract, setup, inputs)
    tensors = {t.name: t.err_over_tol for t in findings.tensors}
    decided = None if contract.dispatch is None else contract.dispatch.of(case)
    verdict = Verdict(
        Outcome.PASS,
        "",
        ran=(*setup.wrote, *result.ran),
        err_over_tol=tensors["out"],
        lse_err_over_tol=tensors.get("lse"),
        z=findings.gains.z if findings.gains.num_statistics else None,
        access=access.state,
        branch=decided.branch if decided is not None else "",
    )
    if findings.clean:
        return replace(verdict, tighter_err_over_tol=_tighter(contract, setup, reference))
    explanation = explain_mismatch(case, findings)
    if named := name_payload_fault(
        batch_of(setup, inputs, contract), contract.content, out.tensor.double() * allowed.out_scale, allowed.largest
    ):
        explanation = with_row(explanation, "explained by", tell_payload_fault(named))
    if case.data == "bar_codes":
        _, values = effective_kv(setup.problem, setup.cache, contract.content)
        read = decode_bar_codes(out.tensor.double() * allowed.out_scale, setup.problem, values)
        explanation = with_row(explanation, "attended", *read) if read else explanation
    reason = explanation["summary"]
    if addresses := tell_addresses(setup, contract, out.tensor):
        explanation = with_row(explanation, "address", *addresses)
        reason = f"{addresses[0]}; {reason}"
    if exchanged := explain_stale(setup, contract, inputs, findings):
        explanation = with_row(explanation, "looks like", *exchanged)
        reason = f"{exchanged[0]}; {reason}"
    return replace(verdict, outcome=Outcome.FAIL, reason=reason, explanation=explanation)


def _tighter(contract: Contract, setup: Setup, reference: AttentionReference) -> float | None:
    """Error of out over the tolerance it would have if P were rounded one step more finely; for ordinary data."""
    case = setup.problem.case
    finer = finer_tolerance(reference, contract.numerics, case.dtype, case.head_size) if case.data == "normal" else None
    return None if finer is None else judge(setup.outputs[0].tensor, None, reference, finer).err_over_tol
