"""Kernels are found by folder, loaded by path, and never shadow a package called `kernels`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from harness.case import Case, Rows
from harness.errors import KernelNotFound, KernelRaised
from harness.kernel.registry import IN_TREE, find_kernels, get, load_entry

CONTRACT = """
from harness.cache.content import Content
from harness.kernel.contract import Contract

KERNELS = (
    Contract(
        name={name!r}, about="", entry={entry!r}, content=Content.ALL, features=frozenset(),
        needs={needs!r}, install_hint="pip install it",
    ),
)
"""


def family(folder: Path, name: str = "mine", entry: str = "code.py:launch", needs: tuple[str, ...] = ()) -> Path:
    (folder / "family").mkdir(parents=True)
    (folder / "family" / "contract.py").write_text(CONTRACT.format(name=name, entry=entry, needs=needs))
    (folder / "family" / "code.py").write_text("from .helper import launch\n")
    (folder / "family" / "helper.py").write_text("def launch(args):\n    return 'launched'\n")
    return folder


def test_the_kernels_of_the_tree_are_found() -> None:
    assert set(find_kernels()) == {
        "prefix_prefill",
        "paged_decode",
        "chunked_prefill_paged_decode",
        "unified_paged",
        "torch_sdpa_paged",
        "batch_prefill",
        "batch_prefill_v2",
        "batch_prefill_v3",
    }


def test_a_folder_outside_the_tree_is_found_and_its_files_import_each_other(tmp_path: Path) -> None:
    contract = find_kernels([family(tmp_path)])["mine"]
    assert load_entry(contract)(None) == "launched"  # type: ignore[arg-type]


def test_finding_kernels_imports_neither_torch_nor_triton() -> None:
    code = (
        "import sys; from harness.kernel.registry import find_kernels; find_kernels();"
        "print({'torch', 'triton'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=IN_TREE.parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_mistakes_are_one_clear_message(tmp_path: Path) -> None:
    with pytest.raises(KernelNotFound, match="no kernels here"):
        find_kernels([tmp_path])
    with pytest.raises(KernelNotFound, match="'paged_decode' is declared twice"):
        find_kernels([family(tmp_path / "twice", name="paged_decode")])
    kernels = find_kernels([family(tmp_path / "needs", needs=("no_such_package",))])
    with pytest.raises(KernelNotFound, match=r"'mine' needs no_such_package\. pip install it"):
        load_entry(kernels["mine"])
    with pytest.raises(KernelNotFound, match="Did you mean 'unified_paged'"):
        get(kernels, "unified_pagd")
    broken = family(tmp_path / "broken")
    (broken / "family" / "contract.py").write_text("KERNELS = 1 +\n")
    with pytest.raises(KernelNotFound, match=r"broken/family/contract\.py:1: SyntaxError"):
        find_kernels([broken])
    kernels = find_kernels([family(tmp_path / "function", entry="code.py:lunch")])
    with pytest.raises(KernelNotFound, match=r"is not a function\. Did you mean 'launch'\?"):
        load_entry(kernels["mine"])
    kernels = find_kernels([family(tmp_path / "absent", entry="cods.py:launch")])
    with pytest.raises(KernelRaised, match=r"ModuleNotFoundError: No module named 'family\.cods'"):
        load_entry(kernels["mine"])


@pytest.mark.parametrize(
    ("good", "bad", "words"),
    [
        (
            "features=frozenset()",
            "features=frozenset({'prefil'})",
            r"\.py:6: .* of mine: unknown features: prefil;",
        ),
        (
            "features=frozenset()",
            "features=frozenset(), dtypes=frozenset({'float16'})",
            "unknown dtypes: float16; .*fp16",
        ),
        (
            "features=frozenset()",
            "features=frozenset(), kv_dtypes='fp8_e4m3'",
            "unknown kv_dtypes: fp8_e4m3; it is a set",
        ),
        ("features=frozenset()", "features=frozenset(), launches=('k')", r"launches is a tuple, \('k',\) for one"),
        ("content=Content.ALL", "content='all'", "content is .*Content.ALL.*, not 'all'"),
        ("code.py:launch", "code.py", "entry is 'file:function', not 'code.py'"),
        ("'mine'", "'my-kernel'", "a name holds letters, digits"),
        ("KERNELS =", "KERNEL =", "KERNELS is a tuple of contracts, there is none"),
        ("KERNELS = (", "KERNELS = (3,", r"KERNELS is a tuple of contracts, not \(3, "),
        ("Content.ALL", "Content.EVERYTHING", r"contract\.py:7: AttributeError"),
    ],
)
def test_a_contract_that_no_matrix_could_meet_is_refused_with_its_line(
    tmp_path: Path, good: str, bad: str, words: str
) -> None:
    path = family(tmp_path) / "family" / "contract.py"
    text = path.read_text()
    assert text.count(good) == 1
    path.write_text(text.replace(good, bad))
    with pytest.raises(KernelNotFound, match=words) as caught:
        find_kernels([tmp_path])
    assert "\n" not in str(caught.value)


def test_a_clause_outside_the_contract_is_named() -> None:
    kernels = find_kernels()
    rows = Rows("r", (1,), (3,))
    decode = kernels["paged_decode"]
    assert decode.unsupported(Case("m", "paged_decode", rows)) is None
    clause = decode.unsupported(Case("m", "paged_decode", Rows("r", (2,), (3,))))
    assert clause == "prefill (rows with query_len > 1)"
    clause = decode.unsupported(Case("m", "paged_decode", rows, dtype="fp64"))
    assert clause == "dtype fp64 (admitted: bf16, fp16, fp32)"


def test_a_folder_that_is_named_twice_is_read_once(tmp_path: Path) -> None:
    own = family(tmp_path / "kernels")
    assert set(find_kernels([own, own / ".." / "kernels", IN_TREE])) == {*find_kernels(), "mine"}
