"""What a matrix states about dispatch, held against contracts before a launch and against what ran after it.

Invariant: a statement about a kernel or branch that no contract knows is a mistake of the matrix, with its place; one
that the kernel's own predicate refutes stops a case before its launch; one that the launch refutes fails the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

from harness.case import Case
from harness.dispatch.predicate import Decision
from harness.kernel.contract import Contract
from harness.matrix.axes import case_id
from harness.matrix.matrix import Matrix, MustRun
from harness.matrix.source import Mistake, one_of

Kernels = Mapping[str, Contract]


def refuted(case: Case, contract: Contract, stated: Iterable[MustRun]) -> str | None:
    """Why `case` cannot launch what `stated` says it must, before it launches anything; None where it can."""
    decided = None if contract.dispatch is None else contract.dispatch.of(case)
    for one in _meeting(case, stated):
        if one.kernel not in contract.launches:
            return f"{contract.name} never launches {one.kernel}, which the matrix states (line {one.span.line})"
        if decided is not None and one.kernel not in decided.kernels:
            return (
                f"the dispatch of {contract.name} leads to {_named(decided.kernels)} ({_told(decided)}), "
                f"and the matrix states {one.kernel} (line {one.span.line})"
            )
    return None


def fallbacks(case: Case, contract: Contract, stated: Iterable[MustRun], ran: Collection[str]) -> list[str]:
    """What is wrong with the device kernels that ran, as far as the matrix states them."""
    decided = None if contract.dispatch is None else contract.dispatch.of(case)
    why = f", although its dispatch leads there ({_told(decided)})" if decided is not None else ""
    return [
        f"silent fallback: {_named(ran)} ran instead of {one.kernel}, stated on line {one.span.line}{why}"
        for one in _meeting(case, stated)
        if one.kernel not in ran
    ]


def check_statements(
    matrix: Matrix,
    kernels: Kernels,
    cases: Collection[Case],
    everywhere: Callable[[], Collection[Case]] = tuple,
) -> None:
    """Raise MatrixError for what the statements of `matrix` get wrong for `cases`.

    Where none of `cases` meets a statement and these are not all, `everywhere` gives those of all tiers.
    """
    own = [kernels[name] for name in matrix.kernels]
    with_dispatch = {contract.name: contract.dispatch for contract in own if contract.dispatch is not None}
    launches = {name for contract in own for name in contract.launches}
    for one in matrix.must_run:
        with matrix.source.collect():
            one_of(one.kernel, launches, f"device kernel of {_named(matrix.kernels)}", one.span)
            _check_cases(one, kernels, cases)
            if not _met(one, cases) and not _met(one, everywhere()):  # to expand every tier takes long
                raise Mistake(one.span, f"this meets no case of any tier: '{one.where.text}'")
    for left_out in matrix.unreached:
        with matrix.source.collect():
            name = one_of(left_out.kernel, with_dispatch, "kernel with a dispatch", left_out.kernel_span)
            one_of(left_out.branch, with_dispatch[name].branches, f"branch of {name}", left_out.branch_span)
    matrix.source.finish()


def _check_cases(one: MustRun, kernels: Kernels, cases: Iterable[Case]) -> None:
    for case in cases:
        contract = kernels[case.kernel]
        if contract.unsupported(case) is None and (why := refuted(case, contract, (one,))):
            raise Mistake(one.span, f"{case_id(case)}: {why}")


def _met(one: MustRun, cases: Iterable[Case]) -> bool:
    return any(one.where.evaluate(case) for case in cases)


def _meeting(case: Case, stated: Iterable[MustRun]) -> Iterator[MustRun]:
    return (one for one in stated if one.where.evaluate(case))


def _named(names: Iterable[str]) -> str:
    return ", ".join(names)


def _told(decided: Decision) -> str:
    return f"{decided.branch}: {decided.because}"
