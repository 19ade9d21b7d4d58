"""Plants: known faults of a test's set-up, injected on purpose to see that attnreg tells them from kernel faults.

Invariant: a plant changes exactly one thing between the case and the launch, and says for which cases it does anything.
Of the steps of an engine one is changed, in the middle.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from harness.cache.content import Content, is_decode
from harness.case import Case, Placement
from harness.errors import UsageError
from harness.kernel.arguments import LaunchArguments
from harness.kernel.writer import WriterArguments
from harness.problem.problem import Problem


@dataclass(frozen=True)
class Plant:
    """One fault; each hook defaults to leaving its stage alone. `applies` says where it changes anything."""

    name: str
    about: str
    expected: str  # the outcome it must get
    applies: Callable[[Case, Content], bool]
    case: Callable[[Case], Case] = lambda case: case
    problem: Callable[[Problem], Problem] = lambda problem: problem
    cached_lens: Callable[[Case, Content], tuple[int, ...] | None] = lambda case, content: None
    pool_poison: float = float("nan")
    arguments: Callable[[LaunchArguments], LaunchArguments] = lambda args: args
    writer_arguments: Callable[[WriterArguments], WriterArguments] = lambda args: args
    step_arguments: Callable[[LaunchArguments, LaunchArguments], LaunchArguments | None] = (
        lambda args, previous: args  # those of the step before; None: this step does not show it
    )


def _context_only(case: Case, content: Content) -> tuple[int, ...]:
    """Decode rows get only their context: the newest token is in no cache."""
    rows = zip(case.rows.query_lens, case.rows.context_lens, strict=True)
    return tuple(max(c, 0) if is_decode(q) else content.cached_len(q, c) for q, c in rows)


def _identity_table(case: Case) -> Case:
    """Sequence after sequence on pages 0, 1, 2, ...: a kernel that ignores the table may pass."""
    pages, start = [], 0
    for seq_len in case.rows.seq_lens:
        needed = -(-max(seq_len, 0) // case.page_size)
        pages.append(tuple(range(start, start + needed)))
        start += needed
    return replace(case, placement=Placement("explicit", "identity", tuple(pages)))


def _descales_of_one(case: Case) -> Case:
    return case if case.kv_dtype == "auto" else replace(case, descales_per="tensor", descales="one")


def _int64_indices(args: LaunchArguments) -> LaunchArguments:
    names = ("block_table", "kv_indptr", "kv_page_indices", "kv_last_page_len", "seq_lens")
    given = {name: tensor for name in names if (tensor := getattr(args, name)) is not None}
    return replace(args, **{name: tensor.long() for name, tensor in given.items()})


def _stale_indptr(args: LaunchArguments) -> LaunchArguments:
    assert args.kv_indptr is not None
    return replace(args, kv_indptr=(args.kv_indptr - 1).clamp(min=0))


def _last_slots(args: LaunchArguments) -> LaunchArguments:
    assert args.kv_last_page_len is not None
    return replace(args, kv_last_page_len=(args.kv_last_page_len - 1).clamp(min=0))


def _indices_of_others(args: LaunchArguments) -> LaunchArguments:
    assert args.kv_indptr is not None
    assert args.kv_page_indices is not None
    start, end = args.kv_indptr[1:3].tolist()  # the pages of the second sequence first, then those of the first
    pages = args.kv_page_indices
    return replace(args, kv_page_indices=torch.cat([pages[start:end], pages[:start], pages[end:]]))


def _lists_pages(case: Case, content: Content) -> bool:
    return case.page_table == "kv_indices" and max(case.rows.seq_lens) > 0


def _lists_pages_of_two(case: Case, content: Content) -> bool:
    return case.page_table == "kv_indices" and case.rows.num_seqs > 1 and min(case.rows.seq_lens[:2]) > 0


def _promoted_by_cumsum(args: LaunchArguments) -> LaunchArguments:
    query_lens = args.query_start_loc.diff()  # [num_seqs] int32
    start_loc = torch.cumsum(query_lens, dim=0)  # int64, whatever went in
    return replace(args, query_start_loc=torch.nn.functional.pad(start_loc, (1, 0)))


def _has_slots(case: Case, content: Content) -> bool:
    return case.writer is not None and max(case.rows.seq_lens) > 0


def _slots(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[WriterArguments], WriterArguments]:
    """A fault of slot_mapping, int64 [num_tokens]; `change` gets a copy."""
    return lambda args: replace(args, slot_mapping=change(args.slot_mapping.clone()))


def _off_by_one(slots: torch.Tensor) -> torch.Tensor:
    return torch.where(slots >= 0, slots + 1, slots)


def _amid(slots: torch.Tensor) -> tuple[int, int]:
    """A token of the batch that has a slot, and another such (itself where there is one only)."""
    real = [int(token) for token in (slots >= 0).nonzero()[:, 0]]
    middle = real[(len(real) - 1) // 2]
    return middle, real[0] if middle != real[0] else real[-1]


def _of_another(slots: torch.Tensor) -> torch.Tensor:
    token, other = _amid(slots)
    slots[token] = slots[other] if token != other else slots[token] ^ 1
    return slots


def _skipped(slots: torch.Tensor) -> torch.Tensor:
    slots[_amid(slots)[0]] = -1
    return slots


def _steps_with_table(case: Case, content: Content) -> bool:
    return case.steps > 1 and case.page_table == "block_table"


def _stale_table(args: LaunchArguments, previous: LaunchArguments) -> LaunchArguments | None:
    """The page table of the step before, where it fits; None where a row with all its pages needs nothing newer."""
    assert args.block_table is not None
    assert previous.block_table is not None
    table, old = args.block_table.clone(), previous.block_table
    rows, columns = min(len(table), len(old)), min(table.shape[1], old.shape[1])
    table[:rows, :columns] = old[:rows, :columns]
    return _if_live(args, table)


def _reused_page(args: LaunchArguments, previous: LaunchArguments) -> LaunchArguments | None:
    """The first sequence still names a page that the last one has got."""
    assert args.block_table is not None
    if len(args.block_table) == 1:
        return None
    table = args.block_table.clone()
    table[0, 0] = table[-1, 0]
    return _if_live(args, table)


def _if_live(args: LaunchArguments, table: torch.Tensor) -> LaunchArguments | None:
    """`args` with `table` [num_seqs, max_pages], where the first page of a sequence differs; else None."""
    assert args.block_table is not None
    return None if torch.equal(table[:, 0], args.block_table[:, 0]) else replace(args, block_table=table)


NO_PLANT = Plant("none", "nothing is planted", "PASS", applies=lambda case, content: True)

PLANTS: dict[str, Plant] = {
    plant.name: plant
    for plant in (
        Plant(
            "decode-token-missing",
            "decode rows find only their context in the cache, not their newest token",
            "TEST_BUG",
            applies=lambda case, content: (
                _context_only(case, content)
                != tuple(
                    content.cached_len(q, c) for q, c in zip(case.rows.query_lens, case.rows.context_lens, strict=True)
                )
            ),
            cached_lens=_context_only,
        ),
        Plant(
            "index-int64",
            "the page table and seq_lens are torch.long",
            "TEST_BUG",
            applies=lambda case, content: True,
            arguments=_int64_indices,
        ),
        Plant(
            "indptr-stale",
            "kv_indptr counts a page less than each sequence has by now",
            "TEST_BUG",
            applies=_lists_pages,
            arguments=_stale_indptr,
        ),
        Plant(
            "last-page-len",
            "kv_last_page_len holds the last slot in use, one less than the tokens of the last page",
            "TEST_BUG",
            applies=_lists_pages,
            arguments=_last_slots,
        ),
        Plant(
            "indices-exchanged",
            "kv_page_indices has the pages of the second sequence first, then those of the first",
            "TEST_BUG",
            applies=_lists_pages_of_two,
            arguments=_indices_of_others,
        ),
        Plant(
            "cumsum-int64",
            "query_start_loc comes from torch.cumsum, which promotes int32 to int64",
            "TEST_BUG",
            applies=lambda case, content: True,
            arguments=_promoted_by_cumsum,
        ),
        Plant(
            "scale-one",
            "K and V descales are 1: a kernel that ignores them passes",
            "BLIND",
            applies=lambda case, content: case.kv_dtype != "auto",
            case=_descales_of_one,
        ),
        Plant(
            "identity-table",
            "every sequence lies on consecutive pages from page 0: a kernel that ignores the table passes",
            "BLIND",
            applies=lambda case, content: (
                case.steps == 1 and case.placement.kind != "shared_prefix" and max(case.rows.seq_lens) > 0
            ),
            case=_identity_table,
        ),
        Plant(
            "zero-pool",
            "unused slots and pages hold zeros instead of poison: reading them goes unseen",
            "TEST_BUG",
            applies=lambda case, content: True,
            pool_poison=0.0,
        ),
        Plant(
            "slot-int32",
            "slot_mapping is int32, as all other indices are",
            "TEST_BUG",
            applies=_has_slots,
            writer_arguments=_slots(torch.Tensor.int),
        ),
        Plant(
            "slot-off-by-one",
            "slot_mapping names the slot behind the right one",
            "TEST_BUG",
            applies=_has_slots,
            writer_arguments=_slots(_off_by_one),
        ),
        Plant(
            "slot-of-another",
            "slot_mapping sends a token of the batch to the slot of another",
            "TEST_BUG",
            applies=_has_slots,
            writer_arguments=_slots(_of_another),
        ),
        Plant(
            "slot-skipped",
            "slot_mapping takes a token of the batch for padding: it is stored nowhere",
            "TEST_BUG",
            applies=_has_slots,
            writer_arguments=_slots(_skipped),
        ),
        Plant(
            "table-stale",
            "one step of an engine gets the page table of the step before",
            "TEST_BUG",
            applies=_steps_with_table,
            step_arguments=_stale_table,
        ),
        Plant(
            "table-reused",
            "one step of an engine reads a page for a request that another has got meanwhile",
            "TEST_BUG",
            applies=_steps_with_table,
            step_arguments=_reused_page,
        ),
    )
}


def find_plant(name: str) -> Plant:
    """The plant called `name`; UsageError suggests the nearest."""
    if name in PLANTS:
        return PLANTS[name]
    near = difflib.get_close_matches(name, PLANTS, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise UsageError(f"--plant: unknown fault '{name}'.{hint} Known: {', '.join(PLANTS)}")
