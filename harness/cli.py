"""The `attnreg` command: thin over pytest and the loaders. It computes nothing.

attnreg run [pytest arguments]     run matrices (the same as `pytest cases ...`)
attnreg check [matrices]           load and expand matrices, report every mistake
attnreg audit [matrices]           how well cases see the faults their matrix lists; 1 if one is blind
attnreg dispatch [matrices]        which device kernel each case goes to, here or on --platform; 1 if one never does
attnreg kernels                    list kernels and their contracts
attnreg plants                     list set-up faults for --plant
attnreg schema                     print the JSON Schema of a matrix
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from harness.errors import AttnregError, UsageError
from harness.kernel.numerics import UNKNOWN, cost
from harness.kernel.registry import find_kernels, find_writers, writers_of
from harness.matrix.matrix import TIERS
from harness.session import PROJECT


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 fine, 1 failures, 2 unusable input."""
    parser = argparse.ArgumentParser(prog="attnreg", description="Correctness regression for attention kernels.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("run", help="run matrices; takes every option of pytest", add_help=False)
    check = commands.add_parser("check", help="load and expand matrices, report every mistake")
    check.add_argument("paths", nargs="*", type=Path, default=[PROJECT / "cases"])
    _take_kernels(check)
    audit = commands.add_parser("audit", help="how well cases see the faults their matrix lists, without running them")
    audit.add_argument("paths", nargs="*", type=Path, default=[PROJECT / "cases"])
    audit.add_argument("--tier", choices=TIERS, default="smoke", help="tier of the matrices (default: smoke)")
    audit.add_argument("--every-case", action="store_true", help="print the table of case x fault as well")
    audit.add_argument("--json", type=Path, metavar="FILE", help="write everything to FILE as well")
    _take_kernels(audit)
    audit.add_argument("--workers", type=_count, default=2, metavar="N", help="processes (default: 2)")
    audit.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where references are computed")
    dispatch = commands.add_parser("dispatch", help="which device kernel each case goes to, without running them")
    dispatch.add_argument("paths", nargs="*", type=Path, default=[PROJECT / "cases"])
    dispatch.add_argument("--platform", default="", metavar="ARCH", help="e.g. gfx942 (default: the kernels of here)")
    dispatch.add_argument("--tier", choices=TIERS, default="smoke", help="tier of the matrices (default: smoke)")
    dispatch.add_argument("--every-case", action="store_true", help="name every case")
    _take_kernels(dispatch)
    _take_kernels(commands.add_parser("kernels", help="list kernels and their contracts"))
    commands.add_parser("plants", help="list the set-up faults that --plant injects")
    commands.add_parser("schema", help="print the JSON Schema of a matrix")
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["run"]:
        return _run(arguments[1:])
    options = parser.parse_args(arguments)
    try:
        return {
            "check": lambda: _check(options.paths, options.kernels),
            "audit": lambda: _audit(options),
            "dispatch": lambda: _dispatch(options),
            "kernels": lambda: _kernels(options.kernels),
            "plants": _plants,
            "schema": _schema,
        }[options.command]()
    except AttnregError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except BrokenPipeError:  # whoever read the output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _take_kernels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kernels", type=Path, action="append", default=[], metavar="DIR", help="more kernels")


def _run(arguments: list[str]) -> int:
    import pytest

    named = ["-p", "harness.plugin"]  # also where attnreg is not installed
    quiet = ["-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning"]  # this module is, of a plugin
    return int(pytest.main([*named, *quiet, *arguments]))


def _check(paths: Sequence[Path], folders: Sequence[Path]) -> int:
    from harness.dispatch.stated import check_statements
    from harness.items import matrix_files
    from harness.matrix.loading import load

    kernels, mistakes = find_kernels(folders), 0
    for path in matrix_files(paths):
        try:
            matrix = load(path, kernel_names=kernels, writer_names=writers_of(kernels))
            cases = {
                tier: matrix.expand(tier, supported=lambda case: kernels[case.kernel].unsupported(case)).cases
                for tier in TIERS
            }
            check_statements(matrix, kernels, [case for several in cases.values() for case in several])
        except AttnregError as error:
            sys.stderr.write(f"{error}\n")
            mistakes += 1
            continue
        sys.stdout.write(
            f"{matrix.name:<24} " + "  ".join(f"{tier} {len(several)}" for tier, several in cases.items()) + "\n"
        )
    return 2 if mistakes else 0


def _count(text: str) -> int:
    """A number of processes, as typed."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, not '{text}'")
    return int(text)


def _audit(options: argparse.Namespace) -> int:
    import json

    import torch

    from harness.items import matrix_files
    from harness.report.audit import render_matrix, render_total
    from harness.run.audit import AuditRow, audit, jobs

    if options.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no GPU here")
    if options.json is not None and (options.json.is_dir() or not options.json.absolute().parent.is_dir()):
        raise UsageError(f"--json {options.json}: no file can be written there")
    work = list(jobs(matrix_files(options.paths), find_kernels(options.kernels), options.tier, options.device))
    if not work:
        raise UsageError(f"nothing to audit: no matrix with must_see has a case in tier {options.tier}")
    rows: list[AuditRow] = []
    found = audit(work, options.kernels, workers=1 if options.device == "cuda" else options.workers)
    for _, own in groupby(found, key=lambda row: row.matrix):
        rows += (matrix := list(own))
        sys.stdout.write(render_matrix(matrix, options.tier, every_case=options.every_case))
        sys.stdout.flush()
    sys.stdout.write(render_total(rows))
    if options.json is not None:
        data = {"tier": options.tier, "cases": [row.to_data() for row in rows]}
        options.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return int(any(row.blind for row in rows))


def _dispatch(options: argparse.Namespace) -> int:
    from harness.dispatch.sweep import sweep
    from harness.items import matrix_files
    from harness.matrix.loading import load
    from harness.report.dispatch import render_sweeps

    kernels = find_kernels(options.kernels)
    writers = writers_of(kernels)
    matrices = [load(path, kernel_names=kernels, writer_names=writers) for path in matrix_files(options.paths)]
    expansions = [m.expand(options.tier, supported=lambda c: kernels[c.kernel].unsupported(c)) for m in matrices]
    cases = [case for one in expansions for case in one.cases]
    unreached = [one for m in matrices for one in m.unreached if options.tier in one.tiers]
    found = sweep(cases, kernels, unreached, options.platform)
    if not found:
        where = f"on {options.platform}" if options.platform else "here"
        raise UsageError(f"nothing to choose: no kernel with a case in tier {options.tier} has a dispatch {where}")
    sys.stdout.write(render_sweeps(found, every_case=options.every_case))
    return int(any(one.unreached for one in found))


def _kernels(folders: Sequence[Path]) -> int:
    for contract in find_kernels(folders).values():
        sys.stdout.write(f"{contract.name:<30} {contract.content.value:<9} {contract.about}\n")
        sys.stdout.write(f"{'':<30} features: {', '.join(sorted(contract.features))}\n")
        for kernel, numerics in (("", contract.numerics), *contract.numerics_by_kernel):
            known = f" of {kernel}" if kernel else " (unknown)" if numerics == UNKNOWN else ""
            for dtype in sorted(contract.dtypes):
                hidden = cost(numerics, dtype) or "nothing is hidden by roundings of P"
                sys.stdout.write(f"{'':<30} numerics{known}, {dtype}: {hidden}\n")
    for writer in find_writers(folders).values():
        sys.stdout.write(f"{writer.name:<30} {'writer':<9} {writer.about}\n")
        sys.stdout.write(f"{'':<30} features: {', '.join(sorted(writer.features))}\n")
        stored, layouts = ", ".join(sorted(writer.kv_dtypes)), ", ".join(sorted(writer.layouts))
        sys.stdout.write(f"{'':<30} stores: {stored} in {layouts}\n")
    return 0


def _plants() -> int:
    from harness.run.plant import PLANTS

    for plant in PLANTS.values():
        sys.stdout.write(f"{plant.name:<22} {plant.expected:<9} {plant.about}\n")
    return 0


def _schema() -> int:
    from harness.matrix.schema import render

    sys.stdout.write(render())
    return 0
