"""Faults in the source of kernels are named from the trace alone, and the honest kernels say nothing.

Each fault is planted in a copy of the kernel's source; what is compared is the whole line that is told.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from harness.case import Case
from harness.kernel.guarded import MARGIN
from harness.kernel.over_read import MAX_AMOUNT, OverRead
from harness.run.outcome import Outcome
from harness.run.plant import NO_PLANT
from tests.access.faulty import KERNELS, case, faulty, run, told

DECODE = case("paged_decode", (1, 1, 1), (40, 63, 15))
EXACT = case("paged_decode", (1, 1, 1), (40, 63, 15), table_padding="exact")
WINDOW = case("paged_decode", (1, 1), (78, 20), sliding_window=16)
PREFILL = case("prefix_prefill", (5, 1, 9), (30, 40, 0))
PREFILL_WINDOW = case("prefix_prefill", (5,), (79,), sliding_window=17)
MIXED = case("chunked_prefill_paged_decode", (5, 1, 9), (30, 40, 0))
UNIFIED = case("unified_paged", (5, 1), (30, 40))
LISTED = case("unified_paged", (5, 1), (30, 40), page_table="kv_indices")
VECTORIZED = case("unified_paged", (5, 1), (30, 40), layout="vectorized", strides="cache")
UNIFIED_WINDOW = case("unified_paged", (5,), (79,), sliding_window=17)
UNIFIED_SINKS = case("unified_paged", (5,), (110,), sliding_window=17, sink_tokens=3)
SPLIT = case("unified_paged", (1, 1), (140, 70), num_splits=3)
BY_TOKEN = case("unified_paged", (5, 1), (30, 40), kv_dtype="int8", descales_per="token", strides="cache")
BY_HEAD = case("unified_paged", (5, 1), (30, 40), kv_dtype="fp8_e5m2fnuz", descales_per="head", strides="cache")
LOUD = case("unified_paged", (5, 1), (30, 40), kv_dtype="fp8_e4m3", descales_per="page", layout="vllm_classic")


@dataclass(frozen=True)
class Fault:
    name: str
    case: Case
    old: str
    new: str
    said: tuple[str, ...]  # each is the start of a line
    file: str = ""
    wrong: bool = True  # whether numbers are wrong as well


FAULTS = (
    Fault(
        "newest token dropped",
        DECODE,
        "cached = key_pos < seq_len\n",
        "cached = key_pos < seq_len - 1\n",
        ("never read: K and V of position 40 (page 3, slot 8), kv head 0 of sequence 0, which token 0 must see",),
    ),
    Fault(
        "newest token of a mixed batch dropped",
        MIXED,
        "cached = key_pos < seq_len\n",
        "cached = key_pos < seq_len - 1\n",
        ("never read: K and V of position 40 ",),
        file="paged_decode.py",
    ),
    Fault(
        "newest of the cached tokens dropped",
        PREFILL,
        "cached = key_pos < context_len\n",
        "cached = key_pos < context_len - 1\n",
        ("never read: K and V of position 29 ",),
    ),
    Fault(
        "newest of the new tokens dropped",
        PREFILL,
        "exists = (new < query_len)",
        "exists = (new < query_len - 1)",
        ("never read: new K and new V of position 34, kv head 0 of sequence 0, which token 4 must see",),
    ),
    Fault(
        "newest token dropped by the unified kernel",
        UNIFIED,
        "cached = key < seq_len\n",
        "cached = key < seq_len - 1\n",
        ("never read: K and V of position 34 ",),
    ),
    Fault(
        "window edge off by one",
        WINDOW,
        "seq_len - sliding_window, 0)",
        "seq_len - sliding_window + 1, 0)",
        ("never read: K and V of position 63 (page 8, slot 15), kv head 0 of sequence 0, which token 0 must see",),
    ),
    Fault(
        "window edge off by one in prefill",
        PREFILL_WINDOW,
        "first_query - sliding_window + 1, 0)",
        "first_query - sliding_window + 2, 0)",
        ("never read: K and V of position 63 ",),
    ),
    Fault(
        "window edge off by one in the unified kernel",
        UNIFIED_WINDOW,
        "gqa_ratio - window + 1, 0)",
        "gqa_ratio - window + 2, 0)",
        ("never read: K and V of position 63 ",),
    ),
    Fault(
        "sink tokens not visited",
        UNIFIED_SINKS,
        "sink_tiles = tl.cdiv(",
        "sink_tiles = 0 * tl.cdiv(",
        ("never read: K and V of positions 0..2 (page ",),
    ),
    Fault(
        "over-read by one page",
        DECODE,
        "cached = key_pos < seq_len\n",
        "cached = key_pos < seq_len + page_size\n",
        (
            "read too far: page table entry 3 of sequence 0, behind its last page",
            "read too far: K and V of positions 41..47 (page 3, slot 9), kv head 0 of sequence 0",
            "read from an unused page: K and V of page 6, slot 0, kv head 0",
        ),
    ),
    Fault(
        "page table over-read by one entry",
        DECODE,
        "key_pos // page_size, mask=cached",
        "key_pos // page_size, mask=key_pos < seq_len + page_size",
        ("read too far: page table entry 3 of sequence 0, behind its last page",),
        wrong=False,
    ),
    Fault(
        "page table over-read into the next row",
        EXACT,
        "key_pos // page_size, mask=cached",
        "key_pos // page_size, mask=key_pos < tl.minimum(seq_len + page_size, 64)",
        ("read too far: page table entry 3 of sequence 0, behind its last page",),
        wrong=False,
    ),
    Fault(
        "pages of another row",
        UNIFIED,
        "block_table_ptr + seq * table_stride",
        "block_table_ptr + 0 * seq * table_stride",
        (
            "read from another sequence: page table entries 0..2 of sequence 0",
            "never read: K and V of positions 0..40 ",
        ),
        "../_shared/page_table.py",
    ),
    Fault(
        "list of pages over-read by one entry",
        LISTED,
        "key // page_size, mask=cached",
        "key // page_size, mask=key < seq_len + page_size",
        ("read too far: page table entry 3 of sequence 0, behind its last page",),
        wrong=False,
    ),
    Fault(
        "pages of another sequence of a list",
        LISTED,
        "kv_page_indices_ptr + first",
        "kv_page_indices_ptr + 0 * first",
        (
            "read from another sequence: page table entries 0..2 of sequence 0",
            "never read: K and V of positions 0..40 ",
        ),
        "../_shared/page_table.py",
    ),
    Fault(
        "newest token dropped of a list",
        LISTED,
        "tl.load(kv_last_page_len_ptr + seq)",
        "tl.load(kv_last_page_len_ptr + seq) - 1",
        ("never read: K and V of position 34 ",),
        "../_shared/page_table.py",
    ),
    Fault(
        "slots of a vector all alike",
        VECTORIZED,
        "0, 1, v_stride_slot_lane, SLOT_VECTOR,\n",
        "0, 1, 0, SLOT_VECTOR,\n",
        ("never read: V of 30 positions in 1..34 ",),
    ),
    Fault(
        "another KV head",
        PREFILL,
        "kv_head = q_head // gqa_ratio",
        "kv_head = q_head % gqa_ratio",
        (
            "read from another head: K and V of positions 0..29 ",
            "read from another head: new K and new V of positions ",
        ),
    ),
    Fault(
        "descales of another head",
        LOUD,
        "k_descale_slot + kv_head * k_descale_head",
        "k_descale_slot + 0 * kv_head",
        ("never read: dim 0 of descales of page slots 0..2 ", "read from another head: descales of page slots 0..2 "),
    ),
    Fault(
        "descales of another page",
        LOUD,
        "page.to(tl.int64) * k_descale_page +",
        "(page.to(tl.int64) + 1) * k_descale_page +",
        ("never read: dim 0 of descales of page slot",),
    ),
    Fault(
        "V descale never read",
        LOUD,
        "v_descale_ptr + v_descale,",
        "k_descale_ptr + v_descale,",
        ("never read: dim 1 of descales of page slots 0..2 ",),
    ),
    Fault(
        "descale of the neighbouring slot",
        BY_TOKEN,
        "slot * k_descale_slot",
        "(slot ^ 1) * k_descale_slot",
        (
            "read too far: K descale of position 35 (page 3, slot 3), kv head 0 of sequence 0, behind its last cached",
            "never read: K descale of position 34 (page 3, slot 2), kv head 0 of sequence 0, which token 4 must see",
        ),
    ),
    Fault(
        "token descale of another head",
        BY_TOKEN,
        "v_descale_slot + kv_head * v_descale_head",
        "v_descale_slot + (kv_head ^ 1) * v_descale_head",
        (
            "never read: V descale of positions 0..34 ",
            "read from another head: V descale of positions 0..34 ",
        ),
    ),
    Fault(
        "token descale of another page",
        BY_TOKEN,
        "page.to(tl.int64) * v_descale_page",
        "(key // page_size).to(tl.int64) * v_descale_page",
        ("never read: V descale of ",),
    ),
    Fault(
        "descale of head 0 for all",
        BY_HEAD,
        "tl.load(k_descale_ptr + kv_head * k_descale_head)",
        "tl.load(k_descale_ptr)",
        (
            "never read: K descale of positions 0..34, kv head 1 of sequence 0, which tokens 0..4 must see",
            "read from another head: K descale of position 0, kv head 0 of sequence 0",
        ),
    ),
    Fault(
        "last dim dropped",
        UNIFIED,
        "cached[:, None] & (dim_v < head_size_v)[None, :], other=0.0)",
        "cached[:, None] & (dim_v < head_size_v - 1)[None, :], other=0.0)",
        ("never read: dim 31 of V of positions 0..34 ",),
    ),
    Fault(
        "last split not merged",
        SPLIT,
        "for split in range(0, with_keys):",
        "for split in range(0, with_keys - 1):",
        ("never read: K and V of positions 128..140 ",),
        file="split_kv.py",
    ),
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "_"))
def test_a_fault_is_named_from_the_trace(fault: Fault, tmp_path: Path) -> None:
    verdict = run(faulty(fault.case.kernel, tmp_path, fault.old, fault.new, fault.file), fault.case)
    assert verdict.outcome is Outcome.FAIL
    lines = told(verdict)
    for said in fault.said:
        assert any(line.startswith(said) for line in lines), lines
    assert (verdict.err_over_tol > 1) is fault.wrong  # type: ignore[operator]
    honest = run(KERNELS[fault.case.kernel], fault.case)
    assert (honest.outcome, honest.access) == (Outcome.PASS, "traced")


def test_what_is_told_names_token_program_and_line(tmp_path: Path) -> None:
    contract = faulty("paged_decode", tmp_path, "cached = key_pos < seq_len\n", "cached = key_pos < seq_len - 1\n")
    assert contract.folder is not None
    inner, outer = (
        next(i for i, line in enumerate((contract.folder / file).read_text().splitlines(), 1) if text in line)
        for file, text in (("attention_step.py", "tile = tl.load("), ("paged_decode.py", "k = load_cached("))
    )
    first = told(run(contract, DECODE))
    assert first[:2] == [
        "never read: K and V of position 40 (page 3, slot 8), kv head 0 of sequence 0, which token 0 must see",
        "by program (0, 0, 0) of paged_decode_kernel, "
        f"attention_step.py:{inner} from paged_decode.py:{outer}; 5 like it",
    ]
    assert told(run(contract, DECODE, geometry_seed=0)) == first
    moved = told(run(contract, DECODE, geometry_seed=1))  # other pages, another order of programs: the same example
    assert moved[0].startswith("never read: K and V of position 40 ")
    assert moved[1] == first[1]


def test_a_program_that_runs_twice_stores_twice(tmp_path: Path) -> None:
    grid = "(seq_lens.shape[0], num_kv_heads)]"
    verdict = run(faulty("paged_decode", tmp_path, grid, grid.replace(")]", ", 2)]")), DECODE)
    assert verdict.outcome is Outcome.FAIL
    assert verdict.err_over_tol is not None
    assert verdict.err_over_tol <= 1
    assert "elements that another program stored, first at byte" in verdict.reason
    assert "of 'out', element [" in verdict.reason


def test_rows_that_no_program_stores_are_named(tmp_path: Path) -> None:
    contract = faulty(
        "unified_paged", tmp_path, "(num_tiles * splits, num_kv_heads", "(num_tiles * splits, num_kv_heads - 1"
    )
    said = ["never stored: out of tokens 0..4, kv head 1 of sequence 0", "by no program; 1 like it"]
    assert told(run(contract, UNIFIED)) == said


def test_a_declared_over_read_is_provided_and_no_more_than_that(tmp_path: Path) -> None:
    old, new = "key_pos // page_size, mask=cached", "key_pos // page_size, mask=key_pos < seq_len + page_size"
    contract = faulty("paged_decode", tmp_path, old, new)
    longest = case("paged_decode", (1, 1), (40, 20), table_padding="exact")  # the longest row is not the last
    last = case("paged_decode", (1, 1), (20, 40), table_padding="exact")
    for one in (longest, last):
        assert run(contract, one).outcome is Outcome.FAIL
        known = replace(contract, over_reads=(OverRead("block_table", 1, "reads ahead"),))
        assert run(known, one).outcome is Outcome.PASS
        assert run(known, replace(one, strides="all")).outcome is Outcome.PASS
    further = new.replace("+ page_size", "+ 2 * page_size")
    contract = faulty("paged_decode", tmp_path / "further", old, further)
    known = replace(contract, over_reads=(OverRead("block_table", 1, "reads ahead"),))
    assert run(known, last).outcome is Outcome.FAIL
    assert MAX_AMOUNT <= MARGIN


@pytest.mark.parametrize("padding", ["poison_page", "out_of_range", "exact"])
def test_a_declared_over_read_of_a_list_of_pages(padding: str, tmp_path: Path) -> None:
    old, new = "key // page_size, mask=cached", "key // page_size, mask=key < seq_len + page_size"
    contract = faulty("unified_paged", tmp_path, old, new)
    one = case("unified_paged", (1, 1), (20, 40), page_table="kv_indices", table_padding=padding)
    verdict = run(contract, one)
    assert verdict.outcome is Outcome.FAIL
    if padding == "exact":
        assert "past the end of 'kv_page_indices'" in verdict.reason
    known = replace(contract, over_reads=(OverRead("kv_page_indices", 1, "reads ahead"),))
    assert run(known, one).outcome is Outcome.PASS
    contract = faulty("unified_paged", tmp_path / "further", old, new.replace("+ page_size", "+ 2 * page_size"))
    known = replace(contract, over_reads=(OverRead("kv_page_indices", 1, "reads ahead"),))
    assert run(known, one).outcome is Outcome.FAIL


def test_a_declared_over_read_of_slots(tmp_path: Path) -> None:
    """Slots behind the last token of a page that is loaded as a whole, their values masked after the product."""
    contract = faulty(
        "paged_decode", tmp_path, "key_pos < seq_len\n", "key_pos < tl.cdiv(seq_len, page_size) * page_size\n"
    )
    one = case("paged_decode", (1, 1), (40, 20), tail="loud")
    assert told(run(contract, one))[0].startswith("read too far: K and V of positions 41..47 ")
    slots = tuple(OverRead(name, 15, "loads whole pages") for name in ("k_cache", "v_cache"))
    assert run(replace(contract, over_reads=slots), one).outcome is Outcome.PASS
    fewer = tuple(replace(known, amount=6) for known in slots)
    assert told(run(replace(contract, over_reads=fewer), one))[0].startswith("read too far: K and V of position 47 ")


def test_pages_that_left_the_window_are_dead_where_the_contract_says_so(tmp_path: Path) -> None:
    """The kernel reads a tile of 64 keys: harmless where those pages still stand, a fault where they are gone."""
    one = case("paged_decode", (1, 1), (60, 5), sliding_window=16)
    assert run(KERNELS["paged_decode"], one).outcome is Outcome.PASS
    contract = faulty("paged_decode", tmp_path, "cached & (key_pos >= oldest)", "cached")
    assert run(replace(contract, window_pages="live"), one).outcome is Outcome.PASS
    verdict = run(contract, one)
    assert verdict.outcome is Outcome.FAIL
    assert [line.partition(" (")[0] for line in told(verdict)[::2]] == ["read, though dead: K and V of positions 0..31"]


def test_what_is_not_traced_says_so() -> None:
    assert run(KERNELS["unified_paged"], UNIFIED, access_trace=False).access == "not traced: turned off"
    verdict = run(KERNELS["torch_sdpa_paged"], replace(UNIFIED, kernel="torch_sdpa_paged"))
    assert (verdict.outcome, verdict.access) == (Outcome.PASS, "not traced: no Triton program ran")


def test_without_the_trace_a_fault_that_moves_no_number_passes(tmp_path: Path) -> None:
    old, new = "key_pos // page_size, mask=cached", "key_pos // page_size, mask=key_pos < seq_len + page_size"
    contract = faulty("paged_decode", tmp_path, old, new)
    assert run(contract, DECODE, access_trace=False).outcome is Outcome.PASS
    assert run(contract, DECODE).outcome is Outcome.FAIL


def test_a_fault_that_ends_the_kernel_keeps_what_was_traced(tmp_path: Path) -> None:
    contract = faulty(
        "paged_decode", tmp_path, "mask=cached, other=0)\n        slot", "mask=key_pos < 1024, other=0)\n        slot"
    )
    verdict = run(contract, case("paged_decode", (1, 1), (20, 40), table_padding="exact"))
    assert verdict.outcome is Outcome.FAIL
    assert "past the end of 'block_table'" in verdict.reason
    assert verdict.access == "traced up to the fault that ended the kernel"
    assert not any(line.startswith("never stored") for line in told(verdict))


def test_reads_of_a_copy_that_torch_made_are_not_called_missing(tmp_path: Path) -> None:
    contract = faulty(
        "paged_decode", tmp_path, "args.q, args.out, args.k_cache, ", "args.q, args.out, args.k_cache.clone(), "
    )
    verdict = run(contract, DECODE)
    assert verdict.outcome is Outcome.PASS
    assert verdict.access == "traced, but for missing reads of 6 programs fed from outside"


def test_buffers_that_are_not_as_they_were_built_are_not_judged() -> None:
    plant = replace(NO_PLANT, arguments=lambda args: replace(args, v_cache=args.v_cache[..., :16]))
    one = case("paged_decode", (1, 1), (20, 40), head_size_v=16)
    assert run(KERNELS["paged_decode"], one, plant=plant).access == "traced"
    wide = case("paged_decode", (1, 1), (20, 40))
    verdict = run(KERNELS["paged_decode"], wide, plant=plant, contract_checks=False)
    assert verdict.access == "not judged: v_cache not as built"


@pytest.mark.parametrize(("buffer", "amount", "because"), [("q", 1, "x"), ("v_cache", 0, "x"), ("k_cache", 1, "")])
def test_an_over_read_that_is_no_declaration_is_refused(buffer: str, amount: int, because: str) -> None:
    with pytest.raises(ValueError, match="an over-read needs a buffer"):
        OverRead(buffer, amount, because)


def test_pages_of_sink_tokens_stay_alive_where_the_window_has_left_them(tmp_path: Path) -> None:
    contract = replace(KERNELS["unified_paged"], window_pages="dead")
    one = case("unified_paged", (1,), (200,), sliding_window=16, sink_tokens=3)
    honest = run(contract, one)
    assert (honest.outcome, honest.access) == (Outcome.FAIL, "traced")  # a tile of keys reaches beyond these pages
    assert told(honest)[0].startswith("read, though dead: ")
    pages = case("unified_paged", (1,), (200,), sliding_window=16, sink_tokens=3, page_size=64)
    assert run(contract, pages).outcome is Outcome.PASS
    further = faulty("unified_paged", tmp_path, "sink_end - own_first, 0)", "sink_end + 64 - own_first, 0)")
    verdict = run(replace(further, window_pages="dead"), pages)
    assert verdict.outcome is Outcome.FAIL
    assert told(verdict)[0].startswith("read, though dead: K and V of positions 64..127 (page 1, slot 0)")


def test_window_pages_are_live_or_dead() -> None:
    with pytest.raises(ValueError, match="window_pages is live or dead, not 'gone'"):
        replace(KERNELS["paged_decode"], window_pages="gone")
