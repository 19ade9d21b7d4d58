"""Stale descales at page transitions: what attnreg says of them, beside the largest error that a peer's rule allows.

    python benchmarks/page_transitions.py [--quick] [--json FILE] [--seeds N] [--kernels NAME ...]

The probes of cases/page_transitions.yaml (one row of 128 queries over one or two pages of 1024 keys, 8 KV heads, around
page 4096 of 5000) with descales within 2 % and over a range of 32, on honest kernels and on copies of them that scale
the last tile of a page as the page behind it. The peer's rule passes while no element is off by 0.055 (fp8); it is
given the float64 reference over the stored bytes, as the oracle is. Queries are twice as long as N(0, 1): then the rule
sees some of the transitions and not others. Every probe has a seed of its own, as descales differ from page to page.

Exit status 1 if an honest kernel fails, or a stale descale is neither failed or elevated, or is called something else.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from common import PROJECT, finish, parser
from peer_rules import Outputs, aiter_max_abs
from staging import find_kernel, stage

from harness.case import Case
from harness.kernel.arguments import LaunchArguments
from harness.kernel.contract import Contract
from harness.kernel.registry import find_kernels
from harness.matrix.loading import load
from harness.oracle.gain_findings import Z_LIMIT
from harness.run.outcome import Outcome, Verdict
from harness.run.plant import NO_PLANT
from harness.run.run_case import Options, resolve_device, run_case
from tests.access.faulty import again, faulty

MATRIX = PROJECT / "cases" / "page_transitions.yaml"
LAWS = ("quiet", "loud")
HONEST = "honest"
NAMES = {"K": "K descale: ", "K and V": "K and V descales: "}  # what a report on a plant must begin with


def _ahead(which: str) -> tuple[str, str]:
    """Of unified_paged, which loads a descale for each key: that of the page of the key one tile further on."""
    old = f"{which}_descale = page.to(tl.int64)"
    page = "tl.load(table_row + tl.minimum(key + BLOCK_N, seq_len - 1) // page_size, mask=cached, other=0)"
    return old, old.replace("page", page)


Edits = tuple[tuple[str, str], ...]  # source, what it becomes
PLANTS: Mapping[str, Mapping[str, Edits]] = {  # kernel -> what is stale
    "unified_paged": {"K": (_ahead("k"),), "K and V": (_ahead("k"), _ahead("v"))},
    # Two slots of tiles in flight: what is being loaded into the second one, used for the tile that leaves it.
    "batch_prefill_v3": {
        "K": (("start + BLOCK_N, k_descale_b,", "start + BLOCK_N, k_descale_next,"),),
        "K and V": (
            ("start + BLOCK_N, k_descale_b, v_descale_b,", "start + BLOCK_N, k_descale_next, v_descale_next,"),
            ("unit = v_descale_b", "unit = v_descale_next"),
        ),
    },
}
AXES: Mapping[str, Mapping[str, str]] = {"batch_prefill_v3": {"q_dtype": "fp8_e4m3"}}  # that a kernel needs


@dataclass(frozen=True)
class Row:
    kernel: str
    stale: str
    pages: tuple[int, ...]
    descales: str
    seed: int
    outcome: str
    tiers: Mapping[str, float]  # what each found, in units of its limit: more than 1 fails
    named: bool  # whether the report says that the descale of the next page was used
    says: str
    peer_max_abs: float
    peer: str

    @property
    def steps(self) -> bool:
        """Whether there is a transition to get wrong."""
        return len({*self.pages}) > 1

    @property
    def wrong(self) -> str:
        """What must not be, "" where all is well."""
        if self.stale == HONEST or not self.steps:
            return "" if self.outcome == Outcome.PASS.value else f"{self.outcome} of what is right"
        if self.outcome not in (Outcome.FAIL.value, Outcome.ELEVATED.value):
            return f"a stale descale is {self.outcome}"
        return "" if self.named else f"called {self.says or 'nothing'}"


def probes() -> list[Case]:
    matrix = load(MATRIX, kernel_names=find_kernels())
    cases = matrix.expand("ci", supported=lambda case: None).cases
    return list({case.placement.name: case for case in cases}.values())


def rows_of(kernel: str, device: torch.device, seeds: int, quick: bool) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        contracts = {HONEST: find_kernels()[kernel]}
        for i, (stale, (first, *rest)) in enumerate(PLANTS[kernel].items()):
            contracts[stale] = faulty(kernel, Path(folder) / str(i), *first)
            for edit in rest:
                again(contracts[stale], *edit)
        for seed in range(seeds):
            for number, probe in enumerate(probes()):
                if quick and probe.placement.name not in ("on_4096", "on_4096_4097"):
                    continue
                for law in LAWS[:1] if quick else LAWS:
                    case = replace(
                        probe, kernel=kernel, dtype="bf16", data="normal", scale_factor=2.0, descales=law,
                        data_seed=100 * seed + number, **AXES.get(kernel, {}),
                    )  # fmt: skip
                    for stale, contract in contracts.items():
                        yield run(case, contract, stale, device)


def run(case: Case, contract: Contract, stale: str, device: torch.device) -> Row:
    """One case on one kernel; the output is looked at a second time, as the peer would."""
    handed: list[LaunchArguments] = []

    def keep(args: LaunchArguments) -> LaunchArguments:
        handed.append(args)
        return args

    plant = replace(NO_PLANT, arguments=keep)
    verdict = run_case(case, contract, Options(device=device.type, plant=plant, noise_floor="report"))
    want = stage(case, replace(find_kernel(case.kernel), contract=contract), device).reference.out
    outputs = Outputs(handed[0].out, want, want, fp8=True)
    says = (verdict.explanation or {"rows": {}})["rows"].get("looks like", [""])[0]
    return Row(
        kernel=case.kernel,
        stale=stale,
        pages=case.placement.pages[0],
        descales=case.descales,
        seed=case.data_seed,
        outcome=verdict.outcome.value,
        tiers=_tiers(verdict),
        named=says.startswith(NAMES.get(stale, "-")) and "descale of the next page used" in says,
        says=says,
        peer_max_abs=float(outputs.error.max()),
        peer="FAIL" if aiter_max_abs(outputs) else "PASS",
    )


def _tiers(verdict: Verdict) -> dict[str, float]:
    found = {"T1": verdict.err_over_tol, "L": verdict.lse_err_over_tol, "T2": (verdict.z or 0.0) / Z_LIMIT}
    return {tier: size for tier, size in found.items() if size is not None}


def main(arguments: list[str] | None = None) -> int:
    options = parser(__doc__ or "")
    options.add_argument("--seeds", type=int, default=1, help="seeds per probe (default: 1)")
    options.add_argument("--kernels", nargs="+", choices=[*PLANTS], default=[*PLANTS], help="default: all of them")
    chosen = options.parse_args(arguments)
    device = resolve_device("auto")
    start = time.perf_counter()
    found = []
    print(
        f"{'kernel':<17}{'stale':<9}{'pages':<14}{'descales':<10}{'outcome':<9}"
        + "".join(f"{tier:<9}" for tier in ("T1", "L", "T2"))
        + "named  peer"
    )
    for kernel in chosen.kernels:
        for row in rows_of(kernel, device, chosen.seeds, chosen.quick):
            found.append(row)
            named = "yes" if row.named else "-"
            sizes = "".join(f"{row.tiers.get(tier, float('nan')):<9.2g}" for tier in ("T1", "L", "T2"))
            what = f"{row.kernel:<17}{row.stale:<9}{row.pages!s:<14}{row.descales:<10}{row.outcome:<9}"
            peer = f"{row.peer} {row.peer_max_abs:.4f}{'  WRONG: ' if row.wrong else ''}{row.wrong}"
            print(f"{what}{sizes}{named:<7}{peer}", flush=True)
    stale = [row for row in found if row.stale != HONEST and row.steps]
    missed = sum(row.peer == "PASS" for row in stale)
    wrong = [asdict(row) for row in found if row.wrong]
    seconds = time.perf_counter() - start
    print(f"\n{stale[0].says}" if stale else "")
    print(f"{len(stale)} stale descales: the peer's rule passes {missed}, attnreg {sum(bool(r.wrong) for r in stale)}")
    print(f"{len(found)} runs, {len(wrong)} wrong, {seconds:.0f} s")
    finish({"rows": [asdict(row) for row in found], "wrong": wrong, "seconds": seconds}, chosen.json)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
