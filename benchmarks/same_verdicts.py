"""Every in-tree kernel gets the same verdicts interpreted and compiled, honest and with faults.

    python benchmarks/same_verdicts.py --json cpu.json                      on a machine without a GPU
    python benchmarks/same_verdicts.py --json gpu.json --against cpu.json   on one with a GPU

Runs cases of the smoke tier on every kernel, honest and with each fault that the case can show: faults of the arguments
(what a wrong caller or a wrong index would do) and faults in a copy of the source. Prints how many were caught; with
--against it compares outcome by outcome and exits 1 at the first difference.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from common import PROJECT, finish, parser

from harness.case import Case
from harness.kernel.arguments import LaunchArguments
from harness.kernel.contract import Contract
from harness.kernel.registry import IN_TREE, find_kernels
from harness.matrix.axes import case_id
from harness.matrix.loading import load
from harness.run.plant import NO_PLANT
from harness.run.run_case import Options, run_case

ArgumentFault = Callable[[LaunchArguments], LaunchArguments]


class SourceFault(NamedTuple):
    kernels: tuple[str, ...]
    old: str
    new: str
    applies: Callable[[Case], bool]


NUMBERS = Options(access_trace=False)  # accesses show where kernels are interpreted only


def longest(case: Case) -> int:
    return max(case.rows.seq_lens)


ARGUMENT_FAULTS: dict[str, tuple[Callable[[Case], bool], ArgumentFault]] = {
    "lengths one short": (lambda c: min(c.rows.seq_lens) > 2, lambda a: replace(a, seq_lens=a.seq_lens - 1)),
    "softmax scale 2 % off": (lambda c: longest(c) > 20, lambda a: replace(a, softmax_scale=a.softmax_scale * 1.02)),
    "window one wider": (
        lambda c: c.sliding_window is not None and c.sliding_window < min(c.rows.seq_lens),
        lambda a: replace(a, sliding_window=a.sliding_window + 1),
    ),
    "pages of another row": (
        lambda c: len({*c.rows.seq_lens}) > 1 and min(c.rows.seq_lens) > c.page_size,
        lambda a: replace(a, block_table=a.block_table[:, :1].flip(0).expand_as(a.block_table).contiguous()),
    ),
    "ALiBi dropped": (lambda c: c.alibi and longest(c) > 8, lambda a: replace(a, alibi_slopes=None)),
    "sinks dropped": (lambda c: c.sinks, lambda a: replace(a, sinks=None)),
    "soft cap dropped": (lambda c: c.logits_soft_cap is not None, lambda a: replace(a, logits_soft_cap=0.0)),
    "descales exchanged": (
        lambda c: c.kv_dtype != "auto" and longest(c) > 8,
        lambda a: replace(a, k_scale=a.v_scale, v_scale=a.k_scale),
    ),
}

PAGED = ("prefix_prefill", "paged_decode", "chunked_prefill_paged_decode")
SOURCE_FAULTS = {
    "accumulator not rescaled": SourceFault(PAGED, "acc * rescale[:, None]", "acc", lambda c: longest(c) > 70),
    "dequantised without its scale": SourceFault(
        PAGED, " * tl.load(scale_ptr + kv_head * stride_scale)", "", lambda c: c.kv_dtype != "auto"
    ),
    "padding holds ones (no fault)": SourceFault(  # the negative control: q is 0 and P is 0 there
        PAGED, "other=0.0)\n    if tile", "other=1.0)\n    if tile", lambda c: c.head_size not in (16, 32, 64, 128)
    ),
}


def cases_of(kernel: str, kernels: dict[str, Contract], quick: bool) -> list[Case]:
    found: list[Case] = []
    for path in sorted((PROJECT / "cases").glob("*.yaml")):
        if path.name != "rows.yaml":
            expansion = load(path, kernel_names=kernels).expand(
                "smoke", supported=lambda c: kernels[c.kernel].unsupported(c)
            )
            found += [case for case in expansion.cases if case.kernel == kernel]
    return found[:: max(len(found) // 3, 1)] if quick else found


def faulty_contract(contract: Contract, fault: SourceFault, folder: Path) -> Contract:
    """`contract` on a copy of its family in which `fault.old`, which occurs once, is `fault.new`."""
    assert contract.folder is not None
    for name in ("_shared", contract.folder.name):
        shutil.copytree(IN_TREE / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    family = folder / contract.folder.name
    sources = {file: file.read_text() for file in family.glob("*.py")}
    if sum(text.count(fault.old) for text in sources.values()) != 1:
        sys.exit(f"{fault.old!r} does not occur exactly once in {contract.folder.name}")
    for file, text in sources.items():
        file.write_text(text.replace(fault.old, fault.new))
    return replace(contract, folder=family)


def verdicts(quick: bool, scratch: Path) -> Iterator[tuple[str, str]]:
    """(fault and case, outcome) for every combination."""
    kernels = find_kernels()
    for name, contract in kernels.items():
        cases = cases_of(name, kernels, quick)
        for case in cases:
            yield f"honest | {case_id(case)}", run_case(case, contract, NUMBERS).outcome.value
            for fault, (applies, change) in ARGUMENT_FAULTS.items():
                if applies(case):
                    plant = replace(NO_PLANT, name=fault, arguments=change)
                    options = replace(NUMBERS, plant=plant, contract_checks=False)
                    yield f"{fault} | {case_id(case)}", run_case(case, contract, options).outcome.value
        for fault, source in SOURCE_FAULTS.items():
            chosen = [case for case in cases if source.applies(case)]
            if name not in source.kernels or not chosen:
                continue
            faulty = faulty_contract(contract, source, scratch / name / fault.replace(" ", "_"))
            for case in chosen:
                yield f"{fault} | {case_id(case)}", run_case(case, faulty, NUMBERS).outcome.value


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--against", type=Path, metavar="FILE", help="figures of another machine to agree with")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = dict(verdicts(chosen.quick, Path(scratch)))
    counts = Counter((key.split(" | ")[0], outcome) for key, outcome in found.items())
    for (fault, outcome), count in sorted(counts.items()):
        print(f"{fault:<34} {outcome:<6} {count}")
    finish({"verdicts": found}, chosen.json)
    if chosen.against:
        other = json.loads(chosen.against.read_text())["verdicts"]
        shared = found.keys() & other.keys()
        different = sorted(key for key in shared if found[key] != other[key])
        for key in different:
            print(f"differs: {key}: {found[key]} here, {other[key]} there")
        print(f"{len(shared) - len(different)} of {len(shared)} verdicts agree with {chosen.against}")
        sys.exit(bool(different) or len(shared) != len(found))


if __name__ == "__main__":
    main()
