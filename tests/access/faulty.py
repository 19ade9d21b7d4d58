"""Kernels with one fault in a copy of their source, and runs of small cases on them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from harness.case import Case, Rows
from harness.kernel.contract import Contract
from harness.kernel.registry import IN_TREE, find_kernels
from harness.run.outcome import Verdict
from harness.run.run_case import Options, run_case

KERNELS = find_kernels()


def faulty(name: str, folder: Path, old: str, new: str, file: str = "") -> Contract:
    """The contract of kernel `name` on a copy of its source with `new` for `old`, which occurs once in `file`.

    file: that of the kernel's entry unless given.
    """
    contract = KERNELS[name]
    assert contract.folder is not None
    for part in ("_shared", contract.folder.name):
        shutil.copytree(IN_TREE / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    return again(replace(contract, folder=folder / contract.folder.name), old, new, file)


def again(contract: Contract, old: str, new: str, file: str = "") -> Contract:
    """`contract`, of a copy already, with one more change in it."""
    assert contract.folder is not None
    source = contract.folder / (file or contract.entry.partition(":")[0])
    text = source.read_text()
    assert text.count(old) == 1, old
    source.write_text(text.replace(old, new))
    return contract


def case(kernel: str, query_lens: tuple[int, ...], context_lens: tuple[int, ...], **axes: object) -> Case:
    sizes = {"num_q_heads": 4, "gqa_ratio": 2, "head_size": 32} | axes
    return Case("access", kernel, Rows("rows", query_lens, context_lens), **sizes)  # type: ignore[arg-type]


def run(contract: Contract, one: Case, **options: object) -> Verdict:
    return run_case(one, contract, Options(device="cpu", **options))  # type: ignore[arg-type]


def told(verdict: Verdict) -> list[str]:
    """What the access oracle says, line by line."""
    assert verdict.explanation is not None, verdict.outcome
    return list(verdict.explanation["rows"].get("accesses", ()))
