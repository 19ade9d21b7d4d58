"""Stale descales: a tile scaled by its neighbour page's descale fails however little it moves, and is called so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from harness.case import Case, Placement, Rows
from harness.interpreter import prepare
from harness.kernel.arguments import LaunchArguments
from harness.kernel.registry import find_kernels
from harness.oracle.observability import MARGIN, Effect
from harness.run.observe import Demand, observe_case
from harness.run.outcome import Outcome, Verdict
from harness.run.plant import NO_PLANT
from harness.run.run_case import Options, run_case
from tests.access.faulty import again, faulty

prepare("cpu")

ONE = Case(
    "m", "unified_paged", Rows("r", (64,), (448,)), kv_dtype="fp8_e4m3", descales_per="page",
    descales="quiet", dtype="bf16", head_size=64,
    num_q_heads=4, gqa_ratio=2, page_size=256, causal=False, placement=Placement("explicit", "at_6", ((6, 7),)),
)  # fmt: skip
MORE = replace(ONE, rows=Rows("r", (40, 1), (350, 300)), page_size=128, placement=Placement(), causal=True)

EARLY, LATE = "tl.minimum(key + BLOCK_N, seq_len - 1)", "tl.maximum(key - BLOCK_N, 0)"  # keys a tile further on
TWO_EARLY = "tl.minimum(key + 2 * BLOCK_N, seq_len - 1)"
NEXT_6_7 = (
    "the ratio of the {} of page 7 and page 6: descale of the next page used one tile early (page transition 6 -> 7)"
)
Edit = tuple[str, str]  # source, what it becomes


def scaled_as(which: str, key: str, head: str = "kv_head") -> Edit:
    """Keys have the descale of the page of another `key`, or of another `head`."""
    old = f"{which}_descale = page.to(tl.int64) * {{0}}_page + slot * {{0}}_slot + kv_head * {{0}}_head"
    old = old.format(f"{which}_descale")
    page = f"tl.load(table_row + ({key}) // page_size, mask=cached, other=0).to"
    return old, old.replace("page.to", page).replace("kv_head", head)


def both(key: str, head: str = "kv_head") -> tuple[Edit, ...]:
    return scaled_as("k", key, head), scaled_as("v", key, head)


K_LOADED = "tl.load(k_descale_ptr + k_descale, mask=cached, other=1.0)[None, :]"
PLANTS: dict[str, tuple[tuple[Edit, ...], tuple[str, ...]]] = {  # name: (edits, the words)
    "K early": ((scaled_as("k", EARLY),),
                ("K descale: keys 192-255 of sequence 0 (the last 64 of page 6)", NEXT_6_7.format("K descale"))),
    "V early": ((scaled_as("v", EARLY),),
                ("V descale: keys 192-255 of sequence 0 (the last 64 of page 6)", NEXT_6_7.format("V descale"))),
    "both early": (both(EARLY), ("K and V descales: keys 192-255", NEXT_6_7.format("K and V descales"))),
    "K two tiles early": ((scaled_as("k", TWO_EARLY),), ("keys 128-255 ", "(the last 128 of page 6)")),
    "K two tiles early, of every second tile": (
        (scaled_as("k", f"tl.where(key // BLOCK_N % 2 == 0, {TWO_EARLY}, key)"),),
        ("K descale: keys 128-191 of sequence 0 (64 of the last 128 of page 6)", "used two tiles early")),
    "K late": ((scaled_as("k", LATE),),
               ("K descale: keys 256-319 of sequence 0 (the first 64 of page 7)", "previous page used one tile late",
                "(page transition 6 -> 7)")),
    "K early, one head": ((scaled_as("k", f"tl.where(kv_head == 1, {EARLY}, key)"),),
                          ("K descale: keys 192-255 ", "of kv head 1 only")),
    "other head": (both("key", "(kv_head + 1) % 2"), ("K and V descales: all keys ", "descale of another head")),
    "K dropped": (((K_LOADED, f"{K_LOADED} * 0 + 1"),), ("K descale: all keys ", "descale not applied")),
    "whole page": (both("key * 0"),
                   ("K and V descales: keys 256-511 of sequence 0 (all of page 7)", "instead of the page's own")),
}  # fmt: skip


def run(case: Case, folder: Path | None = None, edits: tuple[Edit, ...] = ()) -> Verdict:
    contract = find_kernels()["unified_paged"]
    for edit in edits[:1]:
        assert folder is not None
        contract = faulty("unified_paged", folder, *edit)
    for edit in edits[1:]:
        contract = again(contract, *edit)
    return run_case(case, contract, Options(device="cpu", access_trace=False))


def said(verdict: Verdict) -> str:
    assert verdict.explanation is not None, verdict.outcome
    return " ".join(verdict.explanation["rows"].get("looks like", ()))


@pytest.mark.parametrize("case", [ONE, MORE, replace(ONE, descales="loud")], ids=["one transition", "more", "loud"])
def test_an_honest_kernel_passes(case: Case) -> None:
    verdict = run(case)
    assert verdict.outcome is Outcome.PASS
    assert verdict.z is not None
    assert verdict.z < 5


@pytest.mark.parametrize("plant", PLANTS)
def test_what_stands_for_what_is_said(tmp_path: Path, plant: str) -> None:
    edits, words = PLANTS[plant]
    verdict = run(ONE, tmp_path, edits)
    assert verdict.outcome is Outcome.FAIL
    told = said(verdict)
    assert [text for text in words if text not in told] == [], told
    assert verdict.reason.startswith(told)


@pytest.mark.parametrize("descales", ["quiet", "loud"])
def test_every_transition_of_every_sequence(tmp_path: Path, descales: str) -> None:
    verdict = run(replace(MORE, descales=descales), tmp_path, both(EARLY))
    assert verdict.outcome is Outcome.FAIL
    assert "keys 64-127 of sequence 0" in said(verdict)
    assert "and likewise at every page transition" in said(verdict)
    assert "only" not in said(verdict)


Change = Callable[[LaunchArguments], LaunchArguments]


def _page_swap(args: LaunchArguments) -> LaunchArguments:
    table = args.block_table.clone()
    table[:, :2] = table[:, :2].flip(1)
    return replace(args, block_table=table)


def _newest_dropped(args: LaunchArguments) -> LaunchArguments:
    return replace(args, seq_lens=args.seq_lens - 1)


def _one_page_off(args: LaunchArguments) -> LaunchArguments:
    assert args.kv_block_descale is not None
    descale = args.kv_block_descale.clone()
    descale[7, :, 0] *= 1.03
    return replace(args, kv_block_descale=descale)


def _softmax_scale(args: LaunchArguments) -> LaunchArguments:
    return replace(args, softmax_scale=args.softmax_scale * 1.02)


def _one_tile_zero(args: LaunchArguments) -> LaunchArguments:
    v_cache = args.v_cache.clone()
    v_cache.view(torch.uint8)[6, 192:] = 0
    return replace(args, v_cache=v_cache)


@pytest.mark.parametrize("change", [_page_swap, _newest_dropped, _one_page_off, _softmax_scale, _one_tile_zero])
def test_nothing_else_is_called_a_stale_descale(change: Change) -> None:
    """Of two pages seen whole only the keys' order changes, so that rows with a mask are used as well."""
    for case in (ONE, replace(ONE, causal=True)):
        options = Options(
            device="cpu", access_trace=False, plant=replace(NO_PLANT, arguments=change), contract_checks=False
        )
        verdict = run_case(case, find_kernels()["unified_paged"], options)
        if change is _page_swap and not case.causal:
            assert verdict.outcome is Outcome.PASS
            continue
        assert verdict.outcome is Outcome.FAIL
        assert "as scaled by" not in said(verdict)


def _effect(case: Case) -> Effect:
    demand = Demand(("stale_descale",))
    return observe_case(case, find_kernels()["unified_paged"], demand, "cpu").effects[0]


def test_a_matrix_can_demand_that_a_stale_descale_shows() -> None:
    """As elements only, quiet descales would not show; as statistics they do, but not in a single row."""
    quiet, loud = _effect(ONE), _effect(replace(ONE, descales="loud"))
    assert quiet.seen(MARGIN)
    assert loud.size is not None
    assert loud.size > 100 > (quiet.size or 0)
    blind = replace(ONE, rows=Rows("r", (1,), (511,)))
    assert not _effect(blind).seen(MARGIN)
    options = Options(device="cpu", demand=Demand(("stale_descale",)))
    verdict = run_case(blind, find_kernels()["unified_paged"], options)
    assert verdict.outcome is Outcome.BLIND
    assert "cannot see stale_descale of V, one tile" in verdict.reason
