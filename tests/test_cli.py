"""The attnreg command: bad input is one message and status 2, and kernels of one's own are found."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from harness.cli import main
from harness.session import PROJECT

TOYS = Path(__file__).parent / "plugin" / "kernels"
MATRIX = """
matrix: toys
about: A kernel of one's own.
kernels: [toy_honest]
fixed: {dtype: fp32}
axes: {rows: [{name: mix, query_lens: [3, 1], context_lens: [5, 20]}], data_seed: [0, 1]}
tiers: {smoke: full}
"""


def test_kernels_say_what_their_roundings_hide(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    family = tmp_path / "mine"
    family.mkdir()
    (family / "contract.py").write_text(
        "from harness.cache.content import Content\n"
        "from harness.kernel.contract import Contract\n"
        "from harness.kernel.numerics import UNKNOWN\n"
        "KERNELS = (Contract(name='guessed', about='a', entry='a.py:launch', content=Content.ALL,"
        " features=frozenset(), numerics=UNKNOWN),)\n"
    )
    assert main(["kernels", f"--kernels={tmp_path}"]) == 0
    said = capsys.readouterr().out
    assert "numerics (unknown), bf16: P in bf16: a fault must be 8 times as large as with P in fp16" in said
    assert "numerics (unknown), fp32: P in TF32: faults smaller than 2^-10 of V pass" in said
    assert "numerics, fp32: nothing is hidden" in said  # of kernels that declare theirs
    assert "numerics of batch_prefill_v3_kernel, bf16: P in fp8_e4m3" in said  # of one kernel of a contract with two


def test_check_and_kernels_take_folders_of_kernels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    matrix = tmp_path / "toys.yaml"
    matrix.write_text(MATRIX)
    assert main(["check", str(matrix)]) == 2
    assert "unknown kernel 'toy_honest'" in capsys.readouterr().err
    assert main(["check", str(matrix), f"--kernels={TOYS}"]) == 0
    assert "smoke 2" in capsys.readouterr().out
    assert main(["kernels", f"--kernels={TOYS}"]) == 0
    assert "toy_honest" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check", "nowhere.yaml"], "nowhere.yaml: no such file or folder"),
        (["audit", "nowhere.yaml"], "nowhere.yaml: no such file or folder"),
        (["check", "."], ".: no matrix in this folder"),
        (["check", "--kernels=nowhere"], "nowhere: no kernels here"),
        (["kernels", "--kernels=nowhere"], "nowhere: no kernels here"),
        (["check", "latin.yaml"], "latin.yaml:1:1: not UTF-8 text"),
    ],
)
def test_what_cannot_be_used_is_one_message(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if "latin.yaml" in arguments:
        (tmp_path / "latin.yaml").write_bytes(b"matrix: caf\xe9\n")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(words)
    assert error.count("\n") == 1


def test_run_loads_the_plugin_wherever_it_is_called(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makefile(".yaml", toys=MATRIX)
    result = pytester.run(sys.executable, "-m", "harness", "run", "toys.yaml", f"--kernels={TOYS}", "--device=cpu")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["2 passed, 0 blind.*"])
    result.stdout.no_fnmatch_line("*warning*")
