"""The same launch once more: a kernel whose bits depend on the order of its programs is NONDETERMINISTIC.

Invariant: the second launch gets arguments built anew, bit for bit those of the first, and outputs poisoned anew; only
the order in which programs run differs. What a writer had stored is built: the same bits, as they were compared. Under
the interpreter that order is drawn from another seed; on a GPU it is the hardware's: there equal bits show less.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from harness.kernel.contract import Contract
from harness.kernel.guarded import POISON
from harness.kernel.launch import launch
from harness.kernel.registry import Launcher
from harness.run.outcome import Outcome, Verdict
from harness.run.plant import Plant
from harness.run.setup import Setup, build_arguments
from harness.triage.explain import with_row


def with_second_launch(
    verdict: Verdict, contract: Contract, setup: Setup, plant: Plant, launcher: Launcher, *, seed: int
) -> Verdict:
    """`verdict` (a PASS), or NONDETERMINISTIC where a second launch breaks a rule or leaves other bits.

    seed: of the order of programs, another than the first launch had.
    """
    again = build_arguments(setup.problem.without_writer(), contract, plant, setup.fences)
    result = launch(
        contract,
        setup.problem.case,
        launcher,
        again.args,
        again.outputs,
        program_order_seed=seed,
        pools=again.cache.pools_by_argument,
    )
    said = [f"in another order of programs: {violation}" for violation in result.violations]
    for first, second in zip(setup.outputs, again.outputs, strict=True):
        if difference := bit_difference(first.tensor, second.tensor):
            said.append(f"{first.name}: {difference}")
    if not said:
        return verdict
    reason = f"a second launch gives other bits: {'; '.join(said)}"
    explanation = with_row(verdict.explanation, "twice", *said)
    return replace(
        verdict,
        outcome=Outcome.NONDETERMINISTIC,
        reason=reason,
        explanation={**explanation, "summary": reason, "shape": "twice"},
    )


def bit_difference(first: torch.Tensor, second: torch.Tensor) -> str | None:
    """How many elements of two tensors of one shape and type differ in bits, and the first that does; None: none.

    first, second: [num_tokens, num_q_heads, ...]
    """
    integer, _ = POISON[first.element_size()]
    differs = first.contiguous().view(integer) != second.contiguous().view(integer)
    amount = int(differs.sum())
    if not amount:
        return None
    index = tuple(int(i) for i in differs.nonzero()[0])
    place = ", ".join(f"{name} {i}" for name, i in zip(("token", "head", "dim"), index, strict=False))
    values = f"{float(first[index]):.9g} and {float(second[index]):.9g}"
    return f"{amount:,} of {first.numel():,} elements differ, the first at {place}: {values}"
