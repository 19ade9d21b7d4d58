"""One-line address faults in copies of the in-tree kernels, and what a report says of each.

    python -m tests.run.boundary_faults DEVICE      one line of JSON: {fault: [what became of it, ...]}

As a command it runs on a GPU what the tests, whose process interprets Triton, cannot.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from harness.case import Case, Rows
from harness.kernel.contract import Contract
from harness.kernel.registry import IN_TREE, find_kernels
from harness.run.run_case import Options, run_case

KERNELS = find_kernels()
TWO_PHASES = Rows("prefill_then_decode", (3, 1), (20, 14))
TWO_DECODES = Rows("two_decodes", (1, 1), (20, 12))


def probe(kernel: str, boundary: str, **axes: object) -> Case:
    """Rows of 2 and 1 pages of 16 tokens, so that the suspects are the first page of each sequence."""
    rows = TWO_DECODES if kernel == "paged_decode" else TWO_PHASES
    common = {"num_q_heads": 4, "gqa_ratio": 4, "head_size": 64, "data": "needle", "boundary_position": "above"}
    return Case("m", kernel, rows, boundary=boundary, **(common | axes))  # type: ignore[arg-type]


def split(boundary: str, **axes: object) -> Case:
    """Two parts of the keys, both with some of them."""
    case = probe("unified_paged", boundary, boundary_target="workspace", num_splits=2, **axes)
    return replace(case, rows=Rows("two_parts", (3, 1), (70, 80)))


def descales(boundary: str, kernel: str = "unified_paged", **axes: object) -> Case:
    """Four KV heads, so that a boundary can lie in the descales of one page."""
    return probe(kernel, boundary, **({"gqa_ratio": 1} | axes))


class Fault(NamedTuple):
    """`old` becomes `new` wherever it occurs in a kernel's family and the shared files."""

    old: str
    new: str
    case: Case
    says: tuple[str, ...]  # in this order in the report


PAGE = "page.to(tl.int64) * stride_page"
OFFSET = "return offset + (dim // VECTOR) * stride_dim + (dim % VECTOR) * stride_lane"
WHOLE = "(offset + (dim // VECTOR) * stride_dim + (dim % VECTOR) * stride_lane)"
TORCH_PAGE = "page = _pages(args, seq)[position // page_size].long()"
TINY = {"boundary_target": "kv", "page_size": 16, "head_size": 16}
READS = {
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
    "int32 page offset, of V in vectors, its pages listed": Fault(
        PAGE,
        "(page * stride_page.to(tl.int32)).to(tl.int64)",
        probe("unified_paged", "elements31", boundary_target="v", layout="vectorized", page_table="kv_indices"),
        ("V of page 14", "2^32 x -1", "a signed 32-bit offset in elements wraps"),
    ),
    "int32 offset across the boundary, heads first": Fault(
        OFFSET,
        f"return {WHOLE}.to(tl.int32).to(tl.int64)",
        probe("paged_decode", "elements31", boundary_target="k", boundary_position="straddling", layout="hnd"),
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
        ("K of page 65,537", "with sign or the page id is cut to 16 bits", "V of page 65,537", "cut to 16 bits"),
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
TABLE_READS = {
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
CARRY = "the low 32 bits of base + offset carry, and the carry is lost"
TABLE_READS["carry, of a list"] = Fault(
    "table_row + key // page_size",
    "table_row + key // page_size - "
    "(((table_row.to(tl.int64) & 0xFFFFFFFF) + (key // page_size).to(tl.int64) * 4) >> 32) * (1 << 30)",
    replace(
        probe(
            "unified_paged", "carry", boundary_target="table", boundary_position="straddling", page_table="kv_indices"
        ),
        rows=FULL_PAGES,
    ),
    ("entry 7 of the page table at element 7 was read at element -1,073,741,817", CARRY),
)
OF_A_LIST = TABLE_READS["carry, of a list"]
ONE_PAGE_LAST = Rows("one_page_last", (1, 1, 1), (63, 63, 9))  # where sequence 2 begins is found
TABLE_READS |= {
    "carry, of a list, not of its last sequence": OF_A_LIST._replace(
        case=replace(OF_A_LIST.case, rows=ONE_PAGE_LAST),
        says=("entry 6 of the page table at element 6 was read at element -1,073,741,818", CARRY),
    ),
    "carry, of a list, with descales by page": OF_A_LIST._replace(
        case=replace(OF_A_LIST.case, kv_dtype="fp8_e4m3", descales_per="page", data="probe"),
    ),
    "carry, of a list, with descales by token": OF_A_LIST._replace(
        case=replace(OF_A_LIST.case, kv_dtype="fp8_e4m3", descales_per="token", data="probe"),
    ),
    "carry, where each sequence begins": Fault(
        "pages = kv_page_indices_ptr + first",
        "pages = kv_page_indices_ptr + first - "
        "(((kv_page_indices_ptr.to(tl.int64) & 0xFFFFFFFF) + first.to(tl.int64) * 4) >> 32) * (1 << 30)",
        replace(OF_A_LIST.case, rows=Rows("two_begin", (1, 1, 1), (63, 9, 9))),
        ("entry 4 of the page table at element 4 was read at element -1,073,741,820", CARRY),
    ),
}
STORES = {
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
SCRATCH = {
    "signed": Fault(
        "return split * stride_split + token",
        "return (split * stride_split.to(tl.int32)).to(tl.int64) + token",
        split("elements31"),
        ("row 1 of workspace partial_out at element 2,147,48", "2^32 x -1", "a signed 32-bit offset in elements wraps"),
    ),
    "unsigned": Fault(
        "return split * stride_split + token",
        "return ((split * stride_split) & 0xFFFFFFFF) + token",
        split("elements32", boundary_position="far"),
        ("row 1 of workspace partial_out at element 9,663,676,4", "an unsigned 32-bit offset in elements wraps"),
    ),
    "bytes, across the boundary": Fault(
        "out_offsets = part[:, None] + dim_v[None, :]",
        "out_offsets = ((part[:, None] + dim_v[None, :]) * 4).to(tl.int32).to(tl.int64) // 4",
        split("bytes31", boundary_position="straddling"),
        ("row 1 of workspace partial_out at element 536,870,912 was written at element -536,870,912", "in bytes wraps"),
    ),
}
BY_PAGE = {"kv_dtype": "fp8_e4m3", "descales_per": "page", "boundary_target": "descale", "data": "probe"}
BY_TOKEN = {**BY_PAGE, "descales_per": "token"}
DESCALES = {
    "signed": Fault(
        "k_descale = page.to(tl.int64) * k_descale_page",
        "k_descale = (page * k_descale_page.to(tl.int32)).to(tl.int64)",
        descales("elements31", **BY_PAGE),
        ("K descale of page 2", "was read at element -2,", "2^32 x -1", "a signed 32-bit offset in elements wraps"),
    ),
    "unsigned, of V": Fault(
        "v_descale = page.to(tl.int64) * v_descale_page",
        "v_descale = (page.to(tl.uint32) * v_descale_page.to(tl.uint32)).to(tl.int64)",
        descales("elements32", **BY_PAGE, boundary_position="far"),
        ("V descale of page ", "an unsigned 32-bit offset in elements wraps"),
    ),
    "bytes, across the boundary": Fault(
        "_descale_ptr + v_descale,",
        "_descale_ptr + (v_descale * 4).to(tl.uint32).to(tl.int64) // 4,",
        descales("bytes32", **BY_PAGE, boundary_position="straddling"),
        ("V descale of page", "at element 1,073,741,825 was read at element 1", "an unsigned 32-bit offset in bytes"),
    ),
    "of tokens": Fault(
        "k_descale = page.to(tl.int64) * k_descale_page",
        "k_descale = (page * k_descale_page.to(tl.int32)).to(tl.int64)",
        descales("elements31", **BY_TOKEN),
        ("K descale of page 18", "2^32 x -1", "a signed 32-bit offset in elements wraps"),
    ),
}
OF_V3 = {"dtype": "bf16", "kv_dtype": "fp8_e4m3", "q_dtype": "fp8_e4m3"}
V3_DESCALES = {**OF_V3, "descales_per": "page", "page_size": 1024, "boundary_target": "descale", "data": "probe"}
PREFETCHED = "entry = kv_block_descale_ptr + page.to(tl.int64) * stride_page"
PREFILLS = Rows("prefills", (33, 20), (1028, 984))
PIPELINED = {
    "signed": Fault(
        PAGE,
        "(page * stride_page.to(tl.int32)).to(tl.int64)",
        probe("batch_prefill_v3", "elements31", boundary_target="v", **OF_V3),
        ("V of page 14", "2^32 x -1", "a signed 32-bit offset in elements wraps"),
    ),
    "descales": Fault(
        PREFETCHED,
        PREFETCHED.replace("page.to(tl.int64) * stride_page", "(page * stride_page.to(tl.int32)).to(tl.int64)"),
        replace(descales("elements31", **V3_DESCALES), kernel="batch_prefill_v3", rows=PREFILLS),
        ("K descale of page 24", "2^32 x -1", "a signed 32-bit offset in elements wraps", "V descale of page 24"),
    ),
}
ALL = READS | {f"page table, {name}": fault for name, fault in TABLE_READS.items()}
ALL |= {f"out, {name}": fault for name, fault in STORES.items()}
ALL |= {f"descales, {name}": fault for name, fault in DESCALES.items()}
ALL |= {f"workspace, {name}": fault for name, fault in SCRATCH.items()}
ALL |= {f"pipelined tiles, {name}": fault for name, fault in PIPELINED.items()}


class Told(NamedTuple):
    """What became of the case of a fault."""

    honest: str  # outcome on the kernel as it is, and its reason
    pool: str
    physical_bytes: int
    outcome: str  # with the fault
    reason: str
    lines: str  # that name the address


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


def tell(name: str, device: str, folder: Path) -> Told:
    """Run the case of fault `name` without and with it; `folder` takes the copy."""
    old, new, case, _ = ALL[name]
    honest = run_case(case, KERNELS[case.kernel], Options(device=device))
    faulty = run_case(case, mutated(KERNELS[case.kernel], old, new, folder), Options(device=device))
    memory, rows = honest.memory or {}, (faulty.explanation or {}).get("rows", {})
    return Told(
        f"{honest.outcome.value} {honest.reason}".strip(),
        memory.get("pool", ""),
        memory.get("physical_bytes", 0),
        faulty.outcome.value,
        faulty.reason,
        " | ".join(rows.get("address", rows.get("violates", []))),
    )


def main(device: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps({name: tell(name, device, Path(scratch) / str(i)) for i, name in enumerate(ALL)}))


if __name__ == "__main__":
    main(sys.argv[1])
