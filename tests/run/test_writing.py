"""Class D: a writer stores the new tokens and every byte is compared; then attention runs on the memory it left."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from harness.case import Case, Rows
from harness.kernel.fences import Fences
from harness.kernel.registry import find_kernels, find_writers
from harness.run.outcome import Outcome, Verdict
from harness.run.plant import NO_PLANT, PLANTS, Plant
from harness.run.run_case import Options, run_case

KERNELS = find_kernels([Path(__file__).parent / "writers"])
CASE = Case(
    "writing",
    "unified_paged",
    Rows("mixed", (5, 1, 3, 1), (20, 33, 0, -1)),
    kv_dtype="fp8_e4m3",
    num_q_heads=4,
    gqa_ratio=2,
    head_size=32,
    writer="cache_writer",
)


def run(case: Case, plant: Plant = NO_PLANT, *, checks: bool = True, twice: bool = False) -> Verdict:
    options = Options(device="cpu", plant=plant, contract_checks=checks, twice=twice)
    return run_case(case, KERNELS[case.kernel], options)


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize(
    ("kv_dtype", "layout", "strides", "descales_per"),
    [
        ("auto", "linear_nhd", "cache", "tensor"),
        ("auto", "vllm_classic", "all", "tensor"),
        ("fp8_e4m3", "linear_nhd", "all", "head"),
        ("fp8_e4m3", "vllm_classic", "compact", "page"),
        ("fp8_e5m2", "vllm_classic", "cache", "tensor"),
        ("fp8_e5m2", "hnd", "compact", "token"),
        ("fp8_e4m3fnuz", "vectorized", "cache", "tensor"),
        ("fp8_e5m2fnuz", "linear_nhd", "compact", "head"),
        ("int8", "vllm_classic", "all", "tensor"),
        ("int8", "vectorized", "compact", "page"),
    ],
)
def test_the_writer_of_the_tree_is_right_to_the_byte(
    kv_dtype: str, layout: str, strides: str, descales_per: str, dtype: str
) -> None:
    axes = {"kv_dtype": kv_dtype, "layout": layout, "strides": strides, "descales_per": descales_per, "dtype": dtype}
    verdict = run(replace(CASE, **axes))  # type: ignore[arg-type]
    assert verdict.outcome is Outcome.PASS, verdict.reason
    assert verdict.ran == ("cache_writer_kernel", "unified_paged_kernel")


@pytest.mark.parametrize("kernel", ["unified_paged", "torch_sdpa_paged", "paged_decode"])
def test_every_kernel_that_finds_all_tokens_in_the_cache_runs_after_a_writer(kernel: str) -> None:
    rows = Rows("decode", (1, 1, 1), (20, 33, 0))
    for writer in ("cache_writer", "torch_writer"):
        verdict = run(replace(CASE, kernel=kernel, rows=rows, writer=writer), twice=True)
        assert verdict.outcome is Outcome.PASS, verdict.reason


@pytest.mark.parametrize(
    ("kernel", "name"), [("prefix_prefill", "context"), ("chunked_prefill_paged_decode", "by_phase")]
)
def test_kernels_that_get_new_tokens_as_arguments_have_no_writer(kernel: str, name: str) -> None:
    verdict = run(replace(CASE, kernel=kernel))
    assert verdict.outcome is Outcome.UNSUPPORTED
    assert f"content class {name}" in verdict.reason


def test_what_a_writer_does_not_take_is_unsupported() -> None:
    contract = replace(
        KERNELS["unified_paged"], writers=(replace(find_writers()["cache_writer"], layouts=frozenset()),)
    )
    assert contract.unsupported(CASE) == "writer cache_writer: layout linear_nhd (admitted: )"
    assert contract.unsupported(replace(CASE, writer="nobody")) == "writer nobody (known: cache_writer)"


WRONG = {  # writer: axes, and words of the reason
    "without_descale": ({}, ("token 0 (sequence 0, position 20)", "page 1, offset 4", "value without the descale")),
    "multiplied": ({}, ("value * descale, not value / descale",)),
    "descales_exchanged": ({}, ("divided by the descale of the other tensor",)),
    "descale_of_head_0": ({"descales_per": "page"}, ("all heads divided by the descale of KV head 0",)),
    "descale_of_page_1": (
        {"descales_per": "page"},
        ("divided by the descale of sequence 0, position 16",),
    ),
    "toward_zero": ({}, ("rounded toward zero",)),
    "ties_away": ({"dtype": "fp32"}, ("values at the edges", "ties are not rounded to even")),
    "no_saturation": ({}, ("values at the edges", "not held at +-448", "holds nan instead of 448")),
    "twice_rounded": ({}, ("rounded to the wrong neighbour",)),
    "next_slot": ({}, ("token 0 (sequence 0, position 20)", "slot 20", "was not stored")),
    "token_skipped": ({}, ("token 0 (sequence 0, position 20)", "was not stored")),
    "slots_exchanged": ({}, ("token 0 (sequence 0, position 20)", "holds the token of sequence 0, position 21")),
    "padding_stored": ({}, ("a stray store to page 9, offset 15 (of no sequence)", "the padding behind the batch")),
    "padding_to_slot_0": (
        {"tail": "loud"},
        ("a stray store to page 0, offset 0 (the null page)", "the padding behind"),
    ),
    "head_skipped": ({}, ("was stored in part: head 1, dim 0",)),
    "k_for_v": ({}, ("V of token 0", "holds K of the token of sequence 0, position 20")),
    "page_cleaned": ({}, ("K cache: a stray store to page 1, offset 9 (position 25 of sequence 0, behind its end)",)),
    "gap_written": ({"strides": "cache"}, ("a stray store outside every slot",)),
    "input_written": ({}, ("k was written by the kernel",)),
    "raising": ({}, ("ValueError", "no such slot", "writers.py")),
}


@pytest.mark.parametrize("writer", WRONG)
def test_a_wrong_writer_fails_and_is_told_what_it_did(writer: str) -> None:
    axes, words = WRONG[writer]
    case = replace(CASE, **{"writer": writer, **axes})  # type: ignore[arg-type]
    verdict = run(case)
    assert verdict.outcome is Outcome.FAIL, verdict.reason
    assert verdict.reason.startswith(f"writer {writer}: ")
    assert all(word in verdict.reason for word in words), verdict.reason
    assert "unified_paged_kernel" not in verdict.ran  # attention would read what is wrong already
    assert run(replace(case, writer="torch_writer")).outcome is Outcome.PASS


@pytest.mark.parametrize("writer", [
    "next_slot", "token_skipped", "slots_exchanged", "padding_stored", "padding_to_slot_0", "k_for_v",
])  # fmt: skip
@pytest.mark.parametrize("layout", ["linear_nhd", "vllm_classic"])
def test_wrong_places_fail_in_a_cache_that_is_not_quantised_too(writer: str, layout: str) -> None:
    verdict = run(replace(CASE, kv_dtype="auto", writer=writer, layout=layout, strides="all"))
    assert verdict.outcome is Outcome.FAIL, verdict.reason


def test_everything_wrong_is_counted_and_one_of_each_kind_is_told() -> None:
    explanation = run(replace(CASE, writer="next_slot")).explanation
    assert explanation is not None
    assert explanation["rows"]["wrong"][:2] == [
        "K: 10 of 10 slots of new tokens are wrong",
        "K: 4 other slots or gaps were stored to",
    ]
    assert [(one["kind"], one["which"], one["others"]) for one in explanation["writes"]] == [
        ("not_stored", ["k", "v"], 3),
        ("wrong_token", ["k", "v"], 5),
        ("stray", ["k", "v"], 3),
    ]


SLOTS = {
    "slot-int32": ("slot_mapping", "int64 (the contract of cache_writer)", "got int32"),
    "slot-off-by-one": ("20 (page 1, offset 4) for token 0 (sequence 0, position 20)", "the slot of token 1"),
    "slot-of-another": ("for token 4 (sequence 0, position 24)", "the slot of token 0 (sequence 0, position 20)"),
    "slot-skipped": ("for token 4 (sequence 0, position 24)", "-1: not stored"),
}


@pytest.mark.parametrize("name", SLOTS)
def test_a_wrong_slot_mapping_is_a_test_bug(name: str) -> None:
    verdict = run(CASE, PLANTS[name])
    assert verdict.outcome.value == PLANTS[name].expected, verdict.reason
    assert all(word in verdict.reason for word in SLOTS[name]), verdict.reason
    assert verdict.ran == ()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("slot-off-by-one", ("token 0 (sequence 0, position 20)", "was not stored")),
        ("slot-of-another", ("token 0 (sequence 0, position 20)", "holds the token of sequence 0, position 24")),
        ("slot-skipped", ("token 4 (sequence 0, position 24)", "was not stored")),
    ],
)
def test_unchecked_it_shows_in_the_memory(name: str, words: tuple[str, ...]) -> None:
    verdict = run(CASE, PLANTS[name], checks=False)
    assert verdict.outcome is Outcome.FAIL
    assert all(word in verdict.reason for word in words), verdict.reason


@pytest.mark.parametrize("name", ["zero-pool", "index-int64", "decode-token-missing"])
def test_the_other_plants_are_test_bugs_as_without_a_writer(name: str) -> None:
    assert run(CASE, PLANTS[name]).outcome is Outcome.TEST_BUG


PROBE = replace(
    CASE,
    kv_dtype="auto",
    gqa_ratio=4,
    head_size=64,
    data="needle",
    rows=Rows("prefill_then_decode", (3, 1), (20, 14)),
    boundary="elements31",
    boundary_target="k",
    boundary_position="above",
)


@pytest.mark.parametrize(
    "axes",
    [
        {},
        {"boundary": "bytes32", "boundary_target": "v", "boundary_position": "straddling"},
        {"boundary": "carry", "layout": "vllm_classic", "boundary_position": "straddling"},
        {"boundary": "carry", "boundary_target": "slots", "boundary_position": "straddling"},
        {"boundary": "page16", "boundary_target": "kv", "page_size": 8, "head_size": 16, "kv_dtype": "fp8_e4m3"},
    ],
)
def test_the_writer_of_the_tree_stores_beyond_every_boundary(axes: dict[str, object]) -> None:
    verdict = run(replace(PROBE, **axes))  # type: ignore[arg-type]
    assert verdict.outcome is Outcome.PASS, verdict.reason


def test_a_store_to_a_wrapped_address_is_told_by_its_fault() -> None:
    verdict = run(replace(PROBE, writer="offsets_of_32_bits"))
    assert verdict.outcome is Outcome.FAIL, verdict.reason
    assert "was stored at element -" in verdict.reason
    assert "(2^32 x -1): a signed 32-bit offset in elements wraps" in verdict.reason
    assert run(replace(PROBE, writer="offsets_of_32_bits", boundary=None)).outcome is Outcome.PASS


def test_a_slot_that_is_read_at_a_wrong_address_is_told_by_its_fault() -> None:
    probe = replace(PROBE, boundary="carry", boundary_target="slots", boundary_position="straddling")
    verdict = run(replace(probe, writer="carry_lost"))
    assert verdict.outcome is Outcome.FAIL, verdict.reason
    assert verdict.reason == (
        "writer carry_lost: slot of token 3 (sequence 1, position 14) at element 3 was read at element -536,870,909 "
        "(-536,870,912): the low 32 bits of base + offset carry, and the carry is lost"
    )
    assert run(replace(PROBE, writer="carry_lost", boundary=None)).outcome is Outcome.PASS
    skipping = run(replace(probe, writer="token_skipped"))  # another fault is not taken for that of an address
    assert skipping.outcome is Outcome.FAIL
    assert "was read at" not in skipping.reason


@pytest.mark.parametrize("data", ["needle", "normal"])
def test_what_is_run_beside_a_probe_of_slots_has_none(data: str) -> None:
    case = replace(PROBE, boundary="carry", boundary_target="slots", boundary_position="straddling", data=data)
    options = Options(device="cpu", twice=True, twins=("layout",), noise_floor="report")
    verdict = run_case(case, KERNELS[case.kernel], options)
    assert verdict.outcome is Outcome.PASS, verdict.reason
    assert "not compared" not in str(verdict.explanation)


@pytest.mark.parametrize("steps", [1, 6])
@pytest.mark.parametrize("writer", ["cache_writer", "token_skipped", "padding_stored"])
def test_behind_fences_the_same_is_found(writer: str, steps: int) -> None:
    rows = Rows("three", (5, 1, 3), (20, 33, 2))
    case = replace(CASE, rows=rows, writer=writer, strides="all", steps=steps)
    verdict = run_case(case, KERNELS[case.kernel], Options(device="cpu", fences=Fences(on=True)))
    expected = Outcome.PASS if writer == "cache_writer" else Outcome.FAIL
    assert verdict.outcome is expected, verdict.reason


def test_padding_is_there_and_holds_what_no_memory_does() -> None:
    seen = []

    def look(args):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        seen.append(args)
        return args

    assert run(CASE, replace(NO_PLANT, writer_arguments=look)).outcome is Outcome.PASS
    slots, k = seen[0].slot_mapping, seen[0].k
    assert slots.dtype is torch.int64
    assert slots[:5].tolist() == [20, 21, 22, 23, 24]
    assert slots[9:].tolist()[:1] == [-1]  # the row of a padded batch, which has no key
    assert slots[-3:].tolist() == [-1] * 3
    assert bool(k[9].isnan().all())
    assert bool((k[-3:] == -torch.finfo(k.dtype).max).all())
    assert not bool(k[slots >= 0].isnan().any())


@pytest.mark.parametrize("name", ["k", "v", "k_scale", "k_cache", "v_cache"])
def test_other_arguments_of_the_writer_than_were_built_are_a_test_bug(name: str) -> None:
    def changed(args):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        tensor = getattr(args, name)
        integers = tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])
        return replace(args, **{name: (integers ^ 1).view(tensor.dtype)})

    verdict = run(CASE, replace(NO_PLANT, writer_arguments=changed))
    assert verdict.outcome is Outcome.TEST_BUG
    assert f"{name} of the writer" in verdict.reason
