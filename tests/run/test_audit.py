"""What a matrix must see is enforced before the launch and audited without one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.case import Case, Rows
from harness.cli import main
from harness.kernel.registry import find_kernels
from harness.report.audit import render_total
from harness.run.audit import AuditRow, audit, jobs
from harness.run.observe import LAWS, Demand, choose_law
from harness.run.outcome import Outcome, Verdict
from harness.run.plant import find_plant
from harness.run.run_case import Options, run_case
from harness.store.record import Record

KERNELS = find_kernels()
LEGACY = Path(__file__).parents[1] / "observability" / "legacy_fp8.yaml"
ROWS = Rows("mixed", (1, 20), (70, 30))
MATRIX = """
matrix: planted
about: A matrix with a demand.
kernels: [torch_sdpa_paged]
fixed: {{num_q_heads: 4, gqa_ratio: 2, head_size: 24}}
axes:
  kv_dtype: [fp8_e4m3]
  rows: [{{name: mix, query_lens: [1, 20], context_lens: [70, 30]}}]
  data: [{data}]
must_see: [{faults}]
{more}
tiers:
  smoke: full
"""


def make(**axes: Any) -> Case:
    defaults = {"num_q_heads": 4, "gqa_ratio": 2, "head_size": 24}
    return Case(matrix="m", kernel="torch_sdpa_paged", rows=ROWS, **(defaults | axes))


def write(folder: Path, data: str, faults: str, more: str = "") -> Path:
    path = folder / "planted.yaml"
    path.write_text(MATRIX.format(data=data, faults=faults, more=more))
    return path


def audited(path: Path) -> list[AuditRow]:
    return list(audit(list(jobs([path], KERNELS, "smoke"))))


def ran(case: Case, *faults: str, **options: Any) -> Verdict:
    demand = Demand(faults)
    return run_case(case, KERNELS[case.kernel], Options(device="cpu", demand=demand, **options))


def test_the_law_of_another_suite_is_blind_and_named_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", str(LEGACY), "--workers", "1"]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "1 blind" in text
    assert "BLIND legacy_fp8-" in text
    for fault in ("output_zero", "mean_v", "newest_token", "k_descale", "scale_dropped", "softmax_scale"):
        assert f"{fault} (" in text
    assert "outputs lie within +-0.00022 while the tolerance is 0.001; descales are 1" in text
    assert "data: normal for output_zero" in text
    assert "descales: loud for scale_dropped" in text


def test_ordinary_data_see_what_that_law_does_not(tmp_path: Path) -> None:
    path = write(tmp_path, "normal, probe", "newest_token, k_descale, v_descale, scale_dropped, softmax_scale")
    rows = audited(path)
    assert len(rows) == 2
    assert not any(row.blind for row in rows)
    least = rows[0].least_descale_error
    assert least is not None
    assert 0 < least["K"] < 0.02
    assert main(["audit", str(path), "--workers", "1"]) == 0


def test_planted_uniform_data_cannot_see_a_k_descale(
    tmp_path: Path, pytester: pytest.Pytester, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, "uniform", "k_descale")
    (row,) = audited(path)
    assert row.unseen == {"k_descale": 0.0}
    assert row.laws == {"k_descale": "normal"}
    assert row.advice == "data: normal for k_descale"
    result = pytester.runpytest_inprocess(
        "-p", "harness.plugin", "--device=cpu", str(path), f"--reports={tmp_path / 'reports'}"
    )
    assert result.ret == 1
    result.stdout.fnmatch_lines(["BLIND*planted-torch_sdpa_paged-*", "*cannot see*k_descale*(0 of tolerance)*"])
    result.stdout.fnmatch_lines(["*data: normal for k_descale*"])
    off = ["--device=cpu", "--no-contract-checks", f"--reports={tmp_path / 'reports'}"]
    assert pytester.runpytest_inprocess("-p", "harness.plugin", str(path), *off).ret == 0


def test_a_run_is_blind_before_the_launch_and_only_to_what_is_demanded() -> None:
    case = make(data="uniform", kv_dtype="fp8_e4m3")
    verdict = ran(case, "newest_token", "k_descale")
    assert verdict.outcome is Outcome.BLIND
    assert verdict.ran == ()
    assert verdict.explanation is not None
    assert list(verdict.explanation["cannot_see"]) == ["k_descale first page"]
    assert ran(case, "newest_token").outcome is Outcome.PASS
    assert ran(case, "k_descale", contract_checks=False).outcome is Outcome.PASS
    assert ran(replace(case, data="normal"), "newest_token", "k_descale").outcome is Outcome.PASS


@pytest.mark.parametrize("descales_per", ["tensor", "page"])
@pytest.mark.parametrize("plant", ["scale-one", "identity-table"])
def test_set_ups_that_no_output_can_show_are_blind_whatever_is_demanded(plant: str, descales_per: str) -> None:
    case = make(kv_dtype="fp8_e4m3", descales_per=descales_per)
    assert ran(case).outcome is Outcome.PASS
    assert ran(case, plant=find_plant(plant)).outcome is Outcome.BLIND


def test_the_margin_of_a_matrix_decides(tmp_path: Path) -> None:
    (usual,) = audited(write(tmp_path, "normal", "newest_token"))
    size = usual.margins["newest_token"]
    assert size is not None
    assert not usual.blind
    (strict,) = audited(write(tmp_path, "normal", "newest_token", f"margin: {size * 1.01}"))
    assert strict.blind
    (just,) = audited(write(tmp_path, "normal", "newest_token", f"margin: {size * 0.99}"))
    assert not just.blind


def test_auto_takes_the_cheapest_law_that_shows_everything() -> None:
    case = make(data="auto", kv_dtype="fp8_e4m3")
    contract = KERNELS[case.kernel]
    choice = choose_law(case, contract, Demand(("newest_token", "k_descale")), "cpu")
    assert choice.taken.case.data == LAWS[0] == "normal"
    assert choice.missed == {}
    seen = {effect.fault: effect.size or 0.0 for effect in choice.taken.effects}
    demand = Demand(("newest_token",), margin=seen["newest_token"] * 1.5)  # more than normal data show
    harder = choose_law(case, contract, demand, "cpu")
    assert harder.taken.case.data == "probe"
    assert harder.missed == {"normal": ("newest_token",)}


def test_a_run_with_auto_records_the_law_it_took() -> None:
    case = make(data="auto")
    verdict = ran(case, "newest_token")
    assert (verdict.outcome, verdict.law) == (Outcome.PASS, "normal")
    record = Record.of(case, verdict, id="x", matrix_path="m.yaml", line=1, tier="smoke", reproduce="")
    assert (record.law, record.case["data"]) == ("normal", "auto")
    assert Record.from_json(record.to_json()) == record
    assert ran(make(), "newest_token").law == ""


def test_auto_that_no_law_covers_is_blind_and_says_which_axis_is_missing() -> None:
    verdict = ran(make(data="auto", kv_dtype="fp8_e4m3", descales="one"), "newest_token", "scale_dropped")
    assert verdict.outcome is Outcome.BLIND
    demand = Demand(("newest_token", "v_descale"), margin=1e9)
    contract = KERNELS["torch_sdpa_paged"]
    verdict = run_case(make(data="auto"), contract, Options(device="cpu", demand=demand))
    assert verdict.outcome is Outcome.BLIND
    assert verdict.explanation is not None
    assert verdict.explanation["rows"]["try"] == ["shorter rows, or data: probe for newest_token"]


def test_every_case_json_and_workers_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = write(tmp_path, "auto, uniform", "newest_token, k_descale, sink"), tmp_path / "audit.json"
    assert main(["audit", str(path), "--workers", "2", "--every-case", "--json", str(out)]) == 1
    text = capsys.readouterr().out
    assert "BLIND (normal)" in text
    cases = json.loads(out.read_text())["cases"]
    assert [case["law"] for case in cases] == ["normal", "uniform"]
    assert cases[0]["margins"]["sink"] is None
    rows = audited(path)
    assert [row.to_data() for row in rows] == cases
    assert render_total(rows).endswith("\n2 cases, 1 blind: 1 of 4 effects below what is wanted\n")


def test_nothing_to_audit_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, "normal", "newest_token")
    assert main(["audit", str(path), "--tier", "nightly"]) == 2
    assert "nothing to audit" in capsys.readouterr().err


def test_kernels_whose_contracts_are_code_are_audited_by_other_processes(capsys: pytest.CaptureFixture[str]) -> None:
    """The contract of this kernel holds a function of its own module, which another process cannot import by name."""
    assert KERNELS["chunked_prefill_paged_decode"].dispatch is not None
    assert main(["audit", str(LEGACY), "--workers", "2"]) == 1
    assert "1 case, 1 blind: 8 of 8 effects below what is wanted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["nowhere.yaml"], "nowhere.yaml: no such file or folder"),
        (["."], ".: no matrix in this folder"),
        (["notes.txt"], "notes.txt: not a matrix"),
        (["rows.yaml"], "rows.yaml: not a matrix"),
        (["planted.yaml", "--json", "nowhere/audit.json"], "--json nowhere/audit.json: no file can be written there"),
        (["planted.yaml", "--json", "."], "--json .: no file can be written there"),
        (["planted.yaml", "--kernels", "nowhere"], "nowhere: no kernels here"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_unusable_paths_are_one_line(
    arguments: list[str], what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    if arguments[0] != ".":
        write(tmp_path, "normal", "newest_token")
    for name in ("notes.txt", "rows.yaml"):
        (tmp_path / name).write_text("mix: {query_lens: [1], context_lens: [3]}\n")
    assert main(["audit", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(what)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [(["--tier", "nigthly"], "--tier: invalid choice: 'nigthly'"), (["--workers", "0"], "from 1 on")],
)
def test_unusable_options_are_told_with_those_that_are(
    arguments: list[str], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["audit", str(LEGACY), *arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert what in error
    assert "Traceback" not in error


def test_shipped_smoke_cases_see_everything_their_matrices_list() -> None:
    folder = Path(__file__).parents[2] / "cases"
    paths = [path for path in sorted(folder.glob("*.yaml")) if path.name != "rows.yaml"]
    work = list(jobs(paths, KERNELS, "smoke"))
    assert len(work) > 150
    assert [row.id for row in audit(work) if row.blind] == []
