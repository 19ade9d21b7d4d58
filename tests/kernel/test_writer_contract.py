"""Contracts of cache writers: found beside kernels, refused where they make no sense, named by matrices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.cache.content import Content
from harness.case import Case, Rows
from harness.cli import main
from harness.errors import KernelNotFound
from harness.kernel.contract import Contract
from harness.kernel.registry import find_kernels, find_writers, writers_of
from harness.kernel.writer import WriterContract
from harness.matrix import load
from harness.matrix.source import MatrixError

MATRIX = """matrix: demo
about: Writers by name.
kernels: [unified_paged]
fixed: {{rows: one, {fixed}}}
row_mixes: {{one: {{query_lens: [3], context_lens: [20]}}}}
tiers: {{smoke: full}}
"""


def refused(tmp_path: Path, fixed: str) -> str:
    path = tmp_path / "demo.yaml"
    path.write_text(MATRIX.format(fixed=fixed))
    kernels = find_kernels()
    with pytest.raises(MatrixError) as error:
        load(path, kernel_names=kernels, writer_names=writers_of(kernels)).expand(
            "smoke", supported=lambda case: kernels[case.kernel].unsupported(case)
        )
    return str(error.value)


def test_writers_are_found_beside_kernels_which_know_them() -> None:
    assert set(find_writers()) == {"cache_writer"}
    assert not find_writers().keys() & find_kernels().keys()
    assert writers_of(find_kernels()) == find_writers()


def test_a_writer_may_not_have_the_name_of_a_kernel(tmp_path: Path) -> None:
    (tmp_path / "family").mkdir()
    (tmp_path / "family" / "contract.py").write_text(
        "from harness.kernel.writer import WriterContract\n"
        "KERNELS = (WriterContract('unified_paged', 'a namesake', 'code.py:launch'),)\n"
    )
    with pytest.raises(KernelNotFound, match="'unified_paged' is declared twice"):
        find_kernels([tmp_path])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"layouts": frozenset({"linear"})}, "unknown layouts: linear"),
        ({"features": frozenset({"alibi"})}, "unknown features: alibi"),
        ({"entry": "code.py"}, "entry is 'file:function'"),
        ({"launches": "cache_writer_kernel"}, "launches is a tuple"),
    ],
)
def test_mistakes_in_a_contract_are_told(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        WriterContract(**{"name": "mine", "about": "", "entry": "code.py:launch", **fields})


def test_no_attention_kernel_finds_what_a_writer_does() -> None:
    with pytest.raises(ValueError, match=r"content is .*ALL.*, not .*WRITTEN"):
        Contract("mine", "", "code.py:launch", Content.WRITTEN, frozenset())


@pytest.mark.parametrize(
    ("fixed", "words"),
    [
        ("writer: cash_writer", "4:28: unknown writer 'cash_writer'. Did you mean 'cache_writer'?"),
        ("steps: 20", "an engine of 20 steps needs a writer"),
        ("writer: cache_writer, steps: 3, causal: false", "an engine of 3 steps needs a causal mask"),
        ("writer: cache_writer, boundary: elements31, boundary_target: out", "a writer stores to K and V only"),
    ],
)
def test_what_a_matrix_may_not_ask_for_is_a_mistake_with_its_place(tmp_path: Path, fixed: str, words: str) -> None:
    assert words in refused(tmp_path, fixed)


def test_a_writer_among_the_kernels_of_a_matrix_is_told_where_it_belongs(tmp_path: Path) -> None:
    path = tmp_path / "demo.yaml"
    path.write_text(MATRIX.format(fixed="writer: none").replace("[unified_paged]", "[cache_writer]"))
    with pytest.raises(MatrixError, match="cache_writer is a writer: name it with `writer:`, beside an attention"):
        load(path, kernel_names=find_kernels(), writer_names=writers_of(find_kernels()))


def test_what_a_case_launches_includes_its_writer() -> None:
    """compute-sanitizer's findings are those of these kernels."""
    kernels, case = find_kernels(), Case("m", "unified_paged", Rows("r", (1,), (3,)))
    launches = kernels["unified_paged"].launches
    assert kernels["unified_paged"].launches_of(case) == launches
    written = replace(case, writer="cache_writer")
    assert kernels["unified_paged"].launches_of(written) == (*launches, "cache_writer_kernel")
    assert kernels["torch_sdpa_paged"].launches_of(written) == ()  # plain torch: not known


def test_kernels_lists_writers_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels"]) == 0
    told = capsys.readouterr().out
    assert "cache_writer                   writer    reshape and cache" in told
    assert "stores: auto, fp8_e4m3" in told
