"""Boundary probes: honest kernels are green in little memory; each wrong address is caught, and the report says which.

Faults are planted in a copy of a kernel's source, one line each.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from harness.cache import pool, pool_cpu
from harness.case import Case, Rows
from harness.kernel.contract import Contract
from harness.kernel.registry import IN_TREE, find_kernels
from harness.run.outcome import Outcome
from harness.run.plant import PLANTS
from harness.run.run_case import Options, run_case

KERNELS = find_kernels()
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
TWO_PHASES = Rows("prefill_then_decode", (3, 1), (20, 14))
TWO_DECODES = Rows("two_decodes", (1, 1), (20, 12))


def probe(kernel: str, boundary: str, **axes: object) -> Case:
    """Rows of 2 and 1 pages of 16 tokens, so that the suspects are the first page of each sequence."""
    rows = TWO_DECODES if kernel == "paged_decode" else TWO_PHASES
    common = {"num_q_heads": 4, "gqa_ratio": 4, "head_size": 64, "data": "needle", "boundary_position": "above"}
    return Case("m", kernel, rows, boundary=boundary, **(common | axes))  # type: ignore[arg-type]


class Fault(NamedTuple):
    """`old` becomes `new` wherever it occurs in a kernel's family and the shared files."""

    old: str
    new: str
    case: Case
    says: tuple[str, ...]  # in this order in the row "address"


PAGE = "page.to(tl.int64) * stride_page"
OFFSET = "return offset + (dim // VECTOR) * stride_dim + (dim % VECTOR) * stride_lane"
WHOLE = "(offset + (dim // VECTOR) * stride_dim + (dim % VECTOR) * stride_lane)"
TORCH_PAGE = "page = args.block_table[seq, position // page_size].long()"
TINY = {"boundary_target": "kv", "page_size": 16, "head_size": 16}
FAULTS = {
    "int32 page offset": Fault(
        PAGE,
        "(page * stride_page.to(tl.int32)).to(tl.int64)",
        probe("unified_paged", "elements31", boundary_target="k"),
        ("K of page 14", "2^32 x -1", "a signed 32-bit offset in elements wraps"),
    ),
    "int32 page offset, of V": Fault(
        PAGE,
        "(page * stride_page.to(tl.int32)).to(tl.int64)",
        probe("paged_decode", "elements31", boundary_target="v"),
        ("V of page 14", "2^32 x -1", "a signed 32-bit offset in elements wraps"),
    ),
    "int32 offset across the boundary": Fault(
        OFFSET,
        f"return {WHOLE}.to(tl.int32).to(tl.int64)",
        probe("chunked_prefill_paged_decode", "elements31", boundary_target="k", boundary_position="straddling"),
        ("K of page 13 at element 2,147,483,648 was read at element -2,147,483,648",),
    ),
    "unsigned wrap": Fault(
        PAGE,
        "(page.to(tl.uint32) * stride_page.to(tl.uint32)).to(tl.int64)",
        probe("prefix_prefill", "elements32", boundary_target="v"),
        ("V of page 14", "2^32 x -1", "an unsigned 32-bit offset in elements wraps"),
    ),
    "bytes for elements": Fault(
        OFFSET,
        f"return ({WHOLE} * 2).to(tl.int32).to(tl.int64) // 2",
        probe("unified_paged", "bytes31", boundary_target="v"),
        ("V of page 14", "-2,147,483,648", "a signed 32-bit offset in bytes wraps"),
    ),
    "unsigned bytes, beyond twice the boundary": Fault(
        OFFSET,
        f"return ({WHOLE} * 2).to(tl.uint32).to(tl.int64) // 2",
        probe("prefix_prefill", "bytes32", boundary_target="k", boundary_position="far"),
        ("K of page 29", "an unsigned 32-bit offset in bytes wraps"),
    ),
    "16-bit page id": Fault(
        PAGE,
        "(page & 0xFFFF).to(tl.int64) * stride_page",
        probe("unified_paged", "page16", **TINY),
        ("K of page 65,537", "the page id is cut to 16 bits", "V of page 65,537", "the page id is cut to 16 bits"),
    ),
    "16-bit page id with sign": Fault(
        PAGE,
        "page.to(tl.int16).to(tl.int64) * stride_page",
        probe("prefix_prefill", "page15", **TINY),
        ("K of page 32,769", "the page id is cut to 16 bits, with sign", "V of page 32,769"),
    ),
    "24-bit page id": Fault(
        PAGE,
        "(page & 0xFFFFFF).to(tl.int64) * stride_page",
        probe("paged_decode", "page24", **TINY),
        ("K of page 16,777,217", "the page id is cut to 24 bits", "V of page 16,777,217"),
    ),
    "16-bit page id, in torch": Fault(
        TORCH_PAGE,
        TORCH_PAGE.replace(".long()", ".short().long()"),
        probe("torch_sdpa_paged", "page16", **TINY),
        ("K of page 65,537", "the page id is cut to 16 bits"),
    ),
}

FULL_PAGES = Rows("full_pages", (1, 1, 1), (63, 15, 63))  # of 16 tokens: 4, 1 and 4
TABLE_FAULTS = {
    "signed": Fault(
        "block_table_ptr + seq * table_stride",
        "block_table_ptr + seq * table_stride.to(tl.int32)",
        replace(probe("unified_paged", "elements31", boundary_target="table"), rows=FULL_PAGES),
        ("row 2 of the page table at element 2,147,483,6", "2^32 x -1", "a signed 32-bit offset in elements wraps"),
    ),
    "bytes, across the boundary": Fault(
        "block_table_ptr + seq.to(tl.int64) * stride_table + key_pos // page_size",
        "block_table_ptr + ((seq.to(tl.int64) * stride_table + key_pos // page_size) * 4).to(tl.uint32) // 4",
        replace(
            probe("paged_decode", "bytes32", boundary_target="table", boundary_position="straddling"), rows=FULL_PAGES
        ),
        (
            "row 2 of the page table at element 1,073,741,824 was read at element 0",
            "an unsigned 32-bit offset in bytes",
        ),
    ),
}

READ_FAULTS = FAULTS | {f"page table, {name}": fault for name, fault in TABLE_FAULTS.items()}


def mutated(contract: Contract, old: str, new: str, folder: Path) -> Contract:
    """`contract` on a copy of its family and the shared files in which `old` is `new`."""
    assert contract.folder is not None
    for name in ("_shared", contract.folder.name):
        shutil.copytree(IN_TREE / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    sources = {file: file.read_text() for file in folder.rglob("*.py")}
    assert sum(text.count(old) for text in sources.values()) >= 1
    for file, text in sources.items():
        file.write_text(text.replace(old, new))
    return replace(contract, folder=folder / contract.folder.name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", READ_FAULTS)
def test_a_wrong_address_is_caught_and_named(name: str, device: str, tmp_path: Path) -> None:
    old, new, case, says = READ_FAULTS[name]
    verdict = run_case(case, mutated(KERNELS[case.kernel], old, new, tmp_path), Options(device=device))
    assert verdict.outcome is Outcome.FAIL
    assert verdict.explanation is not None
    told = " | ".join(verdict.explanation["rows"]["address"])
    place = 0
    for words in says:
        assert words in told[place:], told
        place = told.index(words, place) + len(words)
    assert verdict.reason.startswith(verdict.explanation["rows"]["address"][0])


OUT_FAULTS = {
    "signed": Fault(
        "(token * out_stride_token + head",
        "((token.to(tl.int32) * out_stride_token.to(tl.int32)).to(tl.int64) + head",
        probe("unified_paged", "elements31", boundary_target="out"),
        (
            "token 3 of out at element 2,147,484,1",
            "was written at element -2,147,483,1",
            "2^32 x -1",
            "a signed 32-bit",
        ),
    ),
    "unsigned": Fault(
        "out_ptr + token * stride_out_token",
        "out_ptr + (token.to(tl.uint32) * stride_out_token.to(tl.uint32)).to(tl.int64)",
        probe("paged_decode", "elements32", boundary_target="out", boundary_position="far"),
        ("token 1 of out at element 9,663,676,416", "an unsigned 32-bit offset in elements wraps"),
    ),
    "bytes": Fault(
        "(token * out_stride_token + head * out_stride_head)[:, None] + (dim * out_stride_dim)[None, :]",
        "(((token * out_stride_token + head * out_stride_head)[:, None] + (dim * out_stride_dim)[None, :]) * 2)"
        ".to(tl.uint32).to(tl.int64) // 2",
        probe("unified_paged", "bytes32", boundary_target="out", boundary_position="straddling"),
        (
            "token 3 of out at element 2,147,483,648 was written at element 0",
            "an unsigned 32-bit offset in bytes wraps",
        ),
    ),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OUT_FAULTS)
def test_a_store_at_a_wrong_address_is_caught_and_named(name: str, device: str, tmp_path: Path) -> None:
    old, new, case, says = OUT_FAULTS[name]
    honest = run_case(case, KERNELS[case.kernel], Options(device=device))
    assert honest.outcome is Outcome.PASS, honest.reason
    assert honest.memory is not None
    assert (honest.memory["pool"], honest.memory["physical_bytes"] < 256 << 20) == ("aliased", True)
    verdict = run_case(case, mutated(KERNELS[case.kernel], old, new, tmp_path), Options(device=device))
    assert verdict.outcome is Outcome.FAIL
    assert verdict.explanation is not None
    told = " | ".join(verdict.explanation["rows"]["violates"])
    assert [words for words in says if words not in told] == [], told


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", READ_FAULTS)
def test_the_same_case_is_green_on_the_honest_kernel_in_little_memory(name: str, device: str) -> None:
    case = READ_FAULTS[name].case
    verdict = run_case(case, KERNELS[case.kernel], Options(device=device))
    assert verdict.outcome is Outcome.PASS, verdict.reason
    assert verdict.memory is not None
    assert verdict.memory["pool"] == "aliased"
    assert verdict.memory["physical_bytes"] < 256 << 20


def test_a_straddled_page_that_no_query_looks_into_is_blind() -> None:
    case = replace(
        probe("prefix_prefill", "elements31", boundary_target="k", boundary_position="straddling"),
        rows=Rows("short", (3, 1), (12, 14)),
    )
    verdict = run_case(case, KERNELS["prefix_prefill"], Options(device="cpu"))
    assert verdict.outcome is Outcome.BLIND
    assert verdict.reason == (
        "cannot see a wrong address of K: the output is the same where a signed 32-bit offset in elements wraps"
    )


@pytest.mark.parametrize("plant", ["zero-pool", "decode-token-missing", "index-int64"])
def test_faults_of_the_set_up_are_no_faults_of_the_kernel(plant: str) -> None:
    case = probe("unified_paged", "elements31", boundary_target="k")
    verdict = run_case(case, KERNELS[case.kernel], Options(device="cpu", plant=PLANTS[plant]))
    assert verdict.outcome is Outcome.TEST_BUG


def test_addresses_that_cannot_be_had_are_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    case = probe("unified_paged", "elements32", boundary_target="k", boundary_position="far")
    monkeypatch.setattr(pool_cpu, "cpu_can_alias", lambda: False)
    monkeypatch.setattr(pool, "available", lambda device: 1 << 30)
    verdict = run_case(case, KERNELS[case.kernel], Options(device="cpu"))
    assert verdict.outcome is Outcome.OUT_OF_MEMORY
    assert "bytes on cpu, and 1,073,741,824 are free" in verdict.reason


TORCH_LAUNCH = "    starts, seq_lens = args"
TORCH_CASE = probe("torch_sdpa_paged", "carry", boundary_target="kv")


def test_a_kernel_that_asks_for_too_much_memory_is_out_of_memory(tmp_path: Path) -> None:
    greedy = mutated(KERNELS["torch_sdpa_paged"], TORCH_LAUNCH, "    torch.empty(1 << 52)\n" + TORCH_LAUNCH, tmp_path)
    assert run_case(TORCH_CASE, greedy, Options(device="cpu")).outcome is Outcome.OUT_OF_MEMORY


@pytest.mark.parametrize("page", [14, 1], ids=["in use", "shared by all unused addresses"])
def test_a_kernel_that_writes_into_an_aliased_cache_fails(page: int, tmp_path: Path) -> None:
    writing = f"    args.k_cache[{page}, 15].zero_()\n" + TORCH_LAUNCH
    verdict = run_case(
        TORCH_CASE, mutated(KERNELS["torch_sdpa_paged"], TORCH_LAUNCH, writing, tmp_path), Options(device="cpu")
    )
    assert verdict.outcome is Outcome.FAIL
    assert "k_cache was written by the kernel" in verdict.reason


def test_every_record_says_what_memory_the_cache_took() -> None:
    case = replace(probe("unified_paged", "carry"), boundary=None, boundary_position="straddling", data="normal")
    dense = run_case(case, KERNELS[case.kernel], Options(device="cpu")).memory
    assert dense is not None
    assert dense["pool"] == "dense"
    assert dense["physical_bytes"] == dense["address_bytes"] > 0
