"""Every argument that violates a contract is named before the launch, with what was expected and what was built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from harness.case import Case, Rows
from harness.errors import SetupBug
from harness.kernel.arguments import LaunchArguments
from harness.kernel.check import check_arguments
from harness.kernel.registry import find_kernels
from harness.problem.problem import build_problem
from harness.run.setup import build_arguments

CONTRACT = find_kernels()["chunked_prefill_paged_decode"]
CASE = Case(
    "check",
    CONTRACT.name,
    Rows("mixed", (5, 1), (20, 33)),
    kv_dtype="fp8_e4m3",
    num_q_heads=4,
    gqa_ratio=2,
    head_size=32,
    layout="vllm_classic",
    alibi=True,
    sinks=True,
)


@pytest.fixture(scope="module")
def args() -> LaunchArguments:
    return build_arguments(build_problem(CASE, torch.device("cpu")), CONTRACT).args


def test_what_the_builder_builds_is_admitted(args: LaunchArguments) -> None:
    check_arguments(CONTRACT, CASE, args)


def with_entry(tensor: torch.Tensor, index: tuple[int, ...], value: float) -> torch.Tensor:
    changed = tensor.clone()
    changed[index] = value
    return changed


FAULTS: dict[str, tuple[str, Callable[[LaunchArguments], dict[str, object]], str]] = {
    "table int64": ("block_table", lambda a: {"block_table": a.block_table.long()}, "int32"),
    "lengths int64": ("seq_lens", lambda a: {"seq_lens": a.seq_lens.long()}, "int32"),
    "starts int64": ("query_start_loc", lambda a: {"query_start_loc": a.query_start_loc.long()}, "int32"),
    "starts short": ("query_start_loc", lambda a: {"query_start_loc": a.query_start_loc[:-1]}, "shape"),
    "starts shifted": ("query_start_loc", lambda a: {"query_start_loc": a.query_start_loc + 1}, "0 at [0]"),
    "lengths are contexts": ("seq_lens", lambda a: {"seq_lens": a.seq_lens - 1}, "25 at [0]"),
    "longest query": ("max_query_len", lambda a: {"max_query_len": 4}, "at least 5"),
    "longest sequence": ("max_seq_len", lambda a: {"max_seq_len": 33}, "at least 34"),
    "table narrow": ("block_table", lambda a: {"block_table": a.block_table[:, :2]}, "3 pages for sequence 1"),
    "page outside": ("block_table", lambda a: {"block_table": with_entry(a.block_table, (1, 2), 999)}, "page ids in"),
    "page negative": ("block_table", lambda a: {"block_table": with_entry(a.block_table, (0, 0), -1)}, "page ids in"),
    "q dtype": ("q", lambda a: {"q": a.q.float()}, "float16"),
    "q heads": ("q", lambda a: {"q": a.q[:, :2]}, "shape"),
    "q dims": ("q", lambda a: {"q": a.q.transpose(1, 2).contiguous().transpose(1, 2)}, "stride 1"),
    "new k missing": ("k", lambda a: {"k": None}, "a tensor"),
    "cache as bytes": ("k_cache", lambda a: {"k_cache": a.k_cache.view(torch.uint8)}, "float8_e4m3fn"),
    "value cache as key cache": ("v_cache", lambda a: {"v_cache": a.k_cache}, "shape"),
    "vector of 16-bit caches": (
        "k_cache",
        lambda a: {"k_cache": torch.empty(*a.k_cache.shape[:2], 1, 16, 32, dtype=a.k_cache.dtype)},
        "shape [any, 2, 2, 16, 16]",
    ),
    "out dtype": ("out", lambda a: {"out": a.out.float()}, "float16"),
    "lse missing": ("lse", lambda a: {"lse": None}, "a tensor"),
    "slopes of kv heads": ("alibi_slopes", lambda a: {"alibi_slopes": torch.ones(2)}, "shape [4]"),
    "sinks double": ("sinks", lambda a: {"sinks": torch.ones(4, dtype=torch.float64)}, "float32"),
    "scale per head": ("k_scale", lambda a: {"k_scale": torch.ones(2)}, "one float32"),
    "scale zero": ("v_scale", lambda a: {"v_scale": torch.zeros(1)}, "above 0"),
    "other device": ("k_cache", lambda a: {"k_cache": a.k_cache.to("meta")}, "device cpu"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_violation_names_tensor_expected_and_got(name: str, args: LaunchArguments) -> None:
    tensor, fault, expected = FAULTS[name]
    with pytest.raises(SetupBug) as caught:
        check_arguments(CONTRACT, CASE, replace(args, **fault(args)))  # type: ignore[arg-type]
    assert caught.value.tensor == tensor
    assert expected in caught.value.expected
    assert caught.value.got


def test_scales_beside_an_unscaled_cache_are_refused() -> None:
    case = replace(CASE, kv_dtype="auto")
    args = build_arguments(build_problem(case, torch.device("cpu")), CONTRACT).args
    check_arguments(CONTRACT, case, args)
    with pytest.raises(SetupBug, match="kv_dtype auto"):
        check_arguments(CONTRACT, case, replace(args, k_scale=torch.tensor([0.5])))


LISTED = find_kernels()["unified_paged"]
LISTED_CASE = replace(CASE, kernel="unified_paged", layout="vectorized", page_table="kv_indices", table_padding="exact")


@pytest.fixture(scope="module")
def listed() -> LaunchArguments:
    return build_arguments(build_problem(LISTED_CASE, torch.device("cpu")), LISTED).args


def as_page(tensor: torch.Tensor | None, entry: int, value: int) -> torch.Tensor:
    assert tensor is not None
    return with_entry(tensor, (entry,), value)


# sequences of 25 and 34 tokens: 2 pages, then 3
LIST_FAULTS: dict[str, tuple[str, Callable[[LaunchArguments], dict[str, object]], str]] = {
    "starts int64": ("kv_indptr", lambda a: {"kv_indptr": a.kv_indptr.long()}, "int32"),
    "pages int64": ("kv_page_indices", lambda a: {"kv_page_indices": a.kv_page_indices.long()}, "int32"),
    "lengths int64": ("kv_last_page_len", lambda a: {"kv_last_page_len": a.kv_last_page_len.long()}, "int32"),
    "starts short": ("kv_indptr", lambda a: {"kv_indptr": a.kv_indptr[:-1]}, "shape [3]"),
    "lengths long": ("kv_last_page_len", lambda a: {"kv_last_page_len": a.kv_indptr}, "shape [2]"),
    "starts descend": ("kv_indptr", lambda a: {"kv_indptr": as_page(a.kv_indptr, 1, 6)}, "2 at [1]"),
    "starts in tokens": ("kv_indptr", lambda a: {"kv_indptr": a.kv_indptr * 16}, "2 at [1]"),
    "last page full": ("kv_last_page_len", lambda a: {"kv_last_page_len": as_page(a.kv_last_page_len, 1, 16)}, "2 at"),
    "last page empty": ("kv_last_page_len", lambda a: {"kv_last_page_len": a.kv_last_page_len * 0}, "9 at [0]"),
    "pages short": ("kv_page_indices", lambda a: {"kv_page_indices": a.kv_page_indices[:4]}, "3 pages for sequence 1"),
    "page outside": (
        "kv_page_indices",
        lambda a: {"kv_page_indices": as_page(a.kv_page_indices, 3, 99)},
        "page ids in",
    ),
    "page negative": (
        "kv_page_indices",
        lambda a: {"kv_page_indices": as_page(a.kv_page_indices, 0, -1)},
        "page ids in",
    ),
    "none": ("kv_page_indices", lambda a: {"kv_page_indices": None}, "a tensor, as page_table is kv_indices"),
    "table beside it": (
        "block_table",
        lambda a: {"block_table": a.kv_indptr[None]},
        "None, as page_table is kv_indices",
    ),
    "another x": ("v_cache", lambda a: {"v_cache": a.v_cache.flatten(2, 3)}, "shape [9, 2, 1, 32, 16]"),
}


@pytest.mark.parametrize("name", LIST_FAULTS)
def test_a_violation_in_a_list_of_pages_is_named(name: str, listed: LaunchArguments) -> None:
    tensor, fault, expected = LIST_FAULTS[name]
    check_arguments(LISTED, LISTED_CASE, listed)
    with pytest.raises(SetupBug) as caught:
        check_arguments(LISTED, LISTED_CASE, replace(listed, **fault(listed)))  # type: ignore[arg-type]
    assert caught.value.tensor == tensor
    assert expected in caught.value.expected
