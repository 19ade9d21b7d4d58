"""What fences do to a launch: addresses change and nothing else; nothing is mapped around any buffer, and the few bytes
that alignment leaves are poison, watched where a kernel may write.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from harness.cache.fence import ALIGNMENT, FENCE, fenced
from harness.case import Case, Rows
from harness.errors import UsageError
from harness.kernel.fences import NO_FENCES, Fences, fence_launch
from harness.kernel.guarded import same_bits
from harness.kernel.launch import handed_out, input_tensors
from harness.kernel.over_read import OverRead
from harness.kernel.registry import find_kernels
from harness.problem.problem import build_problem
from harness.run.outcome import Outcome
from harness.run.run_case import Options, run_case
from harness.run.setup import Setup, build_arguments, check_setup
from tests.access.faulty import case, faulty

KERNELS = find_kernels()
ALL = Fences(True)
ROWS = Rows("mix", (3, 1, 2), (5, 20, 9))
CASES = {
    "compact": Case("m", "unified_paged", ROWS, head_size=24, alibi=True, sinks=True, num_q_heads=5),
    "strided": Case("m", "unified_paged", ROWS, head_size=24, strides="all", table_padding="exact"),
    "by page": Case("m", "unified_paged", ROWS, kv_dtype="fp8_e4m3", descales_per="page", layout="vllm_classic"),
    "by token": Case("m", "unified_paged", ROWS, kv_dtype="int8", descales_per="token", strides="all"),
    "by head": Case(
        "m",
        "unified_paged",
        ROWS,
        kv_dtype="fp8_e5m2fnuz",
        descales_per="head",
        strides="cache",
        q_dtype="fp8_e4m3",
        out_dtype="fp8_e4m3fnuz",
    ),
    "lists": Case("m", "unified_paged", ROWS, page_table="kv_indices", table_padding="exact", layout="hnd"),
    "new tokens": Case("m", "prefix_prefill", ROWS, head_size=20, head_size_v=12, dtype="fp32"),
}


def setup_of(one: Case, fences: Fences = ALL) -> Setup:
    contract = KERNELS[one.kernel]
    setup = build_arguments(build_problem(one, "cpu"), contract, fences=fences)
    check_setup(setup, contract)
    return setup


def is_mapped(address: int) -> bool:
    """Asked of the system, which says no where a read would be fatal."""
    out, into = os.pipe()
    try:
        return int(ctypes.CDLL(None, use_errno=True).write(into, ctypes.c_void_p(address), ctypes.c_size_t(1))) == 1
    finally:
        os.close(out)
        os.close(into)


def tensors(setup: Setup) -> Iterator[tuple[str, torch.Tensor]]:
    yield from input_tensors(setup.args).items()
    yield from ((output.name, output.tensor) for output in setup.outputs)


def end_of(tensor: torch.Tensor) -> int:
    """Address behind the last element."""
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr() + (last + 1) * tensor.element_size()


def memory_of(tensor: torch.Tensor) -> torch.Tensor:
    """uint8 [bytes]: all that is mapped for `tensor`."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


@pytest.mark.parametrize("name", CASES)
def test_every_buffer_has_nothing_mapped_around_it_and_is_else_as_it_was(name: str) -> None:
    plain, setup = setup_of(CASES[name], NO_FENCES), setup_of(CASES[name])
    before, after = dict(tensors(plain)), dict(tensors(setup))
    given = {f.name for f in fields(setup.args) if isinstance(getattr(setup.args, f.name), torch.Tensor)}
    assert setup.fenced == before.keys() == after.keys() == given
    for buffer, tensor in after.items():
        was = before[buffer]
        assert same_bits(tensor, was)
        assert (tensor.shape, tensor.stride(), tensor.dtype) == (was.shape, was.stride(), was.dtype)
        memory = memory_of(tensor)
        start, end = memory.data_ptr(), memory.data_ptr() + len(memory)
        behind = end - end_of(tensor)
        if tensor.dtype == torch.int32 or tensor.numel() == 1:
            assert behind == 0
        else:
            assert (0 <= behind < ALIGNMENT, tensor.data_ptr() % ALIGNMENT) == (True, was.data_ptr() % ALIGNMENT)
        for there in (start - 1, start - FENCE, end, end + FENCE - 1):
            assert not is_mapped(there), buffer
        assert is_mapped(start)
        assert is_mapped(end - 1)


@pytest.mark.parametrize("name", CASES)
def test_what_alignment_leaves_is_poison_and_an_honest_output_is_quiet(name: str) -> None:
    setup = setup_of(CASES[name])
    for buffer, tensor in input_tensors(setup.args).items():
        memory = memory_of(tensor)
        around = torch.ones(len(memory), dtype=torch.bool)
        around[tensor.data_ptr() - memory.data_ptr() : end_of(tensor) - memory.data_ptr()] = False
        minus_zero = tensor.dtype in (torch.int8, torch.float8_e5m2fnuz)  # or the one integer that no payload is
        assert bool((memory[around] == (0x80 if minus_zero else 0xFF)).all()), buffer
    for output in setup.outputs:
        assert output.unwritten().all()
        assert output.overrun() is None
        output.tensor.fill_(1.0)
        assert output.overrun() is None


@pytest.mark.parametrize("fences", [NO_FENCES, ALL], ids=["", "fences"])
@pytest.mark.parametrize("name", CASES)
def test_every_gap_of_every_input_is_poison(name: str, fences: Fences) -> None:
    """NaN between numbers, and between indices what is no index of anything."""
    setup, gaps = setup_of(CASES[name], fences), set()
    for buffer, tensor in input_tensors(setup.args).items():
        memory = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
        live = torch.zeros(len(memory), dtype=torch.bool)
        live.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())[:] = True
        dead = memory[~live]
        gaps |= {buffer} if len(dead) else set()
        if tensor.dtype == torch.int8:
            assert bool((dead == -128).all()), buffer
        elif tensor.dtype == torch.int32:
            assert bool(((dead < 0) | (dead > 1 << 20)).all()), buffer
        else:
            assert bool(dead.float().isnan().all()), buffer
    assert gaps >= {"q", "k_cache", "v_cache", "block_table"} or CASES[name].strides != "all"


@pytest.mark.parametrize("fences", [NO_FENCES, ALL], ids=["", "fences"])
@pytest.mark.parametrize("name", CASES)
def test_every_output_lies_in_red_zones_that_are_watched(name: str, fences: Fences) -> None:
    for output in setup_of(CASES[name], fences).outputs:
        live = torch.zeros(len(output.allocation), dtype=torch.bool)
        live.as_strided(output.tensor.shape, output.tensor.stride(), output.tensor.storage_offset())[:] = True
        zones = (~live).nonzero()[:, 0].tolist()
        assert zones[0] == 0
        assert fences.on or zones[-1] == len(live) - 1
        for at in {zones[0], zones[len(zones) // 2], zones[-1]}:
            spoilt = replace(output, allocation=output.allocation.clone())
            spoilt.allocation[at] = 0
            assert spoilt.overrun() is not None, (output.name, at)


@pytest.mark.parametrize("case_name", ["compact", "lists"])
def test_a_declared_over_read_is_provided_and_nothing_else(case_name: str) -> None:
    name = "block_table" if case_name == "compact" else "kv_page_indices"
    declaring = replace(KERNELS["unified_paged"], over_reads=(OverRead(name, 3, "reads ahead"),))
    setup = build_arguments(build_problem(CASES[case_name], "cpu"), declaring, fences=ALL)
    table = getattr(setup.args, name)
    ahead = table.as_strided((3,), (1,), table.storage_offset() + table.numel())
    assert ahead.unique().numel() == 1
    assert int(ahead[0]) not in table
    assert not is_mapped(end_of(table) + 3 * 4)


def test_what_a_kernel_takes_from_its_workspace_is_fenced_and_watched() -> None:
    split = Case("m", "unified_paged", ROWS, num_q_heads=4, gqa_ratio=2, head_size=24, num_splits=3)
    verdict = run_case(split, KERNELS["unified_paged"], Options(device="cpu", fences=ALL))
    assert (verdict.outcome, verdict.reason) == (Outcome.PASS, "")
    setup = setup_of(split)
    scratch = setup.args.workspace("scratch", (1, 3, 5), torch.float32)
    assert scratch.isnan().all()
    assert end_of(scratch) % ALIGNMENT == 12
    assert is_mapped(end_of(scratch) + 3)
    assert not is_mapped(end_of(scratch) + 4)
    (made,) = handed_out(setup.args)
    assert made.overrun() is None
    made.allocation[-1] = 0
    assert "behind or between the rows of workspace scratch were written" in (made.overrun() or "")
    some = setup_of(split, Fences(True, frozenset({"workspace other"})))
    assert is_mapped(end_of(some.args.workspace("scratch", (3, 5), torch.float32)) + 4)
    assert not is_mapped(end_of(some.args.workspace("other", (3, 5), torch.float32)) + 4)


def test_some_buffers_only() -> None:
    setup = setup_of(CASES["compact"], Fences(True, frozenset({"q", "lse", ""})))
    assert setup.fenced == {"q", "lse"}
    assert not is_mapped(end_of(setup.args.q))
    assert setup_of(CASES["compact"], Fences(True, frozenset({""}))).fenced == frozenset()


def test_views_of_one_storage_stay_views_of_one_storage() -> None:
    both = torch.arange(48, dtype=torch.float16).view(6, 2, 4)
    moved = fenced({"k": both[:, 0], "v": both[:, 1]}, fill=(torch.uint8, 0xFF)).views
    assert torch.equal(moved["k"], both[:, 0])
    assert torch.equal(moved["v"], both[:, 1])
    moved["k"].as_strided((6, 4), (8, 1), moved["k"].storage_offset() + 4).fill_(7.0)
    assert bool((moved["v"] == 7.0).all())
    setup = setup_of(CASES["compact"], NO_FENCES)
    pair = torch.stack([setup.args.k_cache, setup.args.v_cache])
    args = replace(setup.args, k_cache=pair[0], v_cache=pair[1])
    args, _, names = fence_launch(ALL, args, (), fixed=(), room={})
    assert {"k_cache", "v_cache"} <= names
    assert args.k_cache.untyped_storage().data_ptr() == args.v_cache.untyped_storage().data_ptr()
    assert not is_mapped(end_of(args.v_cache))


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 65536])
def test_any_size_and_alignment(size: int) -> None:
    for offset in (0, 8, 40):
        data = torch.arange(size + offset, dtype=torch.float64)[offset // 8 * 8 :].to(torch.uint8)
        one = fenced({"x": data}, fill=(torch.uint8, 0xFF))
        assert torch.equal(one.views["x"], data)
        assert len(one.memory) - one.views["x"].storage_offset() - data.numel() < ALIGNMENT


def test_at_the_front_what_is_left_lies_behind() -> None:
    plain, setup = (
        dict(tensors(setup_of(CASES["strided"], NO_FENCES))),
        setup_of(CASES["strided"], Fences(True, None, True)),
    )
    for buffer, tensor in tensors(setup):
        before = tensor.data_ptr() - memory_of(tensor).data_ptr()
        assert (0 <= before < ALIGNMENT, same_bits(tensor, plain[buffer])) == (True, True)
        assert not is_mapped(memory_of(tensor).data_ptr() - 1)


@pytest.mark.parametrize("kernel", sorted(KERNELS))
@pytest.mark.parametrize("strides", ["compact", "all"])
def test_honest_kernels_are_green_between_fences(kernel: str, strides: str) -> None:
    rows = Rows("decode", (1, 1, 1), (5, 20, 9)) if kernel == "paged_decode" else ROWS
    one = Case("m", kernel, rows, num_q_heads=4, gqa_ratio=2, head_size=24, strides=strides, table_padding="exact")
    if kernel == "batch_prefill_v3":
        one = replace(one, dtype="bf16", kv_dtype="fp8_e4m3", q_dtype="fp8_e4m3", head_size=32)
    verdict = run_case(one, KERNELS[kernel], Options(device="cpu", fences=ALL, twice=True))
    assert (verdict.outcome, verdict.reason) == (Outcome.PASS, "")


def test_an_interpreted_kernel_is_told_its_fault_before_it_touches_a_fence(tmp_path: Path) -> None:
    old, new = "key_pos // page_size, mask=cached", "key_pos // page_size, mask=key_pos < 1024"
    contract = faulty("paged_decode", tmp_path, old, new)
    one = case("paged_decode", (1, 1), (20, 40), table_padding="exact")
    verdict = run_case(one, contract, Options(device="cpu", fences=ALL))
    assert verdict.outcome is Outcome.FAIL
    assert "past the end of 'block_table'" in verdict.reason


def test_buffers_of_a_boundary_probe_stay_where_their_addresses_matter() -> None:
    one = Case(
        "m", "unified_paged", Rows("r", (3, 1), (20, 14)), num_q_heads=4, gqa_ratio=4, head_size=64, data="needle",
        boundary="elements31", boundary_target="k", boundary_position="above",
    )  # fmt: skip
    setup = setup_of(one)
    assert setup.args.k_cache is setup.cache.k
    assert "k_cache" not in setup.fenced
    assert {"v_cache", "q", "out", "block_table"} <= setup.fenced


def test_a_system_without_virtual_memory_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "name", "nt")
    with pytest.raises(UsageError, match="--fences: cpu has no virtual memory"):
        fenced({"x": torch.ones(3)}, fill=(torch.uint8, 0))
