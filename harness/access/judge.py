"""The access oracle: what programs read against what the contract says they may and must, without any tolerance.

Invariant: what a program reads is held against the rows of the output that its stores reach, through workspaces too:
each row has to have every key that it sees read for it, and nothing is read that none of those rows may have read.
Where stores cannot be followed (atomics, memory filled outside the programs) no read is called missing, and `state`
says so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from harness.access.grid import GAP, Ints
from harness.access.reads import Flags, Reads, resolve
from harness.access.scope import Pair, Place, Rows, Scope, scopes
from harness.access.similar import similar
from harness.cache.build import KVCache
from harness.case import Case
from harness.interpreter.trace import Load, Program, Trace
from harness.kernel.arguments import LaunchArguments
from harness.kernel.contract import Contract
from harness.oracle.findings import AccessFinding, AccessFindings

MAX_CELLS = 1024  # wrong cells of one program that are looked up one by one


@dataclass(frozen=True)
class Stored:
    """The part of the output that one program stored last."""

    program: int
    tokens: Ints  # [n]
    heads: Ints  # [n]
    dims: Flags  # [head_size_v]


def judge_accesses(
    case: Case, contract: Contract, cache: KVCache, args: LaunchArguments, trace: Trace, unwritten: Flags
) -> AccessFindings:
    """Everything that `trace` shows to be wrong.  unwritten: [num_tokens, num_q_heads, head_size_v] of out"""
    if not trace.programs:
        return AccessFindings("not traced: no Triton program ran")
    judge = _Judge(case, trace)
    found = [] if trace.cut else list(judge.never_stored(unwritten))
    known = scopes(case, contract, cache, args)
    if unknown := sorted(trace.loads.keys() - {scope.buffer for scope in known}):
        return AccessFindings(f"not judged: {', '.join(unknown)} not as built", similar(found))
    for scope in known:
        loads = trace.loads.get(scope.buffer, ())
        reads = resolve(loads, scope.grid)
        wrong = [*judge.missing(scope, reads), *judge.wrong(scope, reads)]
        found += [judge.packed(scope, reads)] if wrong and judge.explained_by(scope.packed, loads) else wrong
    return AccessFindings(judge.state, similar(found))


def stored_parts(writers: npt.NDArray[np.int32]) -> Iterator[Stored]:
    """The output by program.  writers: [num_tokens, num_q_heads, head_size_v]"""
    by_row = writers[..., 0]
    if (writers == by_row[..., None]).all():
        every_dim = np.ones(writers.shape[2], dtype=bool)
        for program in np.unique(by_row[by_row > 0]).tolist():
            tokens, heads = np.nonzero(by_row == program)
            yield Stored(program, tokens, heads, every_dim)
        return
    for program in np.unique(writers[writers > 0]).tolist():
        here = writers == program
        tokens, heads = np.nonzero(here.any(axis=2))
        yield Stored(program, tokens, heads, here.any(axis=(0, 1)))


class _Judge:
    """The programs of one trace and the rows they serve."""

    def __init__(self, case: Case, trace: Trace) -> None:
        self._case, self._trace = case, trace
        self._rows = Rows.of(case)
        self._stored = sorted(stored_parts(trace.stores["out"]), key=lambda part: self._order(part.program))
        self._sources = {part.program: self._closure(part.program) for part in self._stored}
        self._served: dict[int, set[Pair]] = defaultdict(set)
        self._tokens: dict[int, set[int]] = defaultdict(set)
        for part in self._stored:
            pairs = {pair for pair, _ in self._pairs(part)}
            for program in self._sources[part.program]:
                self._served[program] |= pairs
                self._tokens[program] |= {int(part.tokens.min()), int(part.tokens.max())}
        self._fed_from_outside = self._served.keys() & trace.unstored

    @property
    def state(self) -> str:
        if self._trace.cut:
            return "traced up to the fault that ended the kernel"
        if self._trace.atomics:
            return "traced, but for missing reads: atomics are not followed"
        if self._fed_from_outside:
            return f"traced, but for missing reads of {len(self._fed_from_outside)} programs fed from outside"
        return "traced"

    def never_stored(self, unwritten: Flags) -> Iterator[AccessFinding]:
        """Rows of out with elements that hold what they were handed out with."""
        tokens, heads, _ = np.nonzero(unwritten & (self._trace.stores["out"] == 0))
        sequence, kv_head = self._rows.sequence[tokens], heads // self._case.gqa_ratio
        for pair in sorted(set(zip(sequence.tolist(), kv_head.tolist(), strict=True))):
            here = np.unique(tokens[(sequence == pair[0]) & (kv_head == pair[1])])
            yield self._finding("never_stored", ("out", *pair), here, (None, None), here, None, "")

    def missing(self, scope: Scope, reads: Reads) -> Iterator[AccessFinding]:
        """Places that a row sees and that none of the programs that feed it read."""
        if scope.must is None or self._trace.atomics:
            return
        seen = np.zeros(scope.grid.num_cells, dtype=bool)  # zero pages cost nothing until they are written
        for part in self._stored:
            sources = self._sources[part.program]
            if sources & self._fed_from_outside:
                continue
            dims = part.dims if scope.buffer in ("v_cache", "v") else np.ones(scope.grid.num_dims, dtype=bool)
            cells = reads.covered(sources, dims)
            seen[cells] = True
            for pair, tokens in self._pairs(part):
                tokens, first, end = self._needed(scope, pair[0], tokens)  # [n]
                places = _unseen(seen, scope, pair, first, end)
                if len(places):
                    waiting = tokens[(first <= places[0]) & (places[0] < end)]
                    cell = int(scope.cells(pair, places[:1])[0])
                    whose, physical = (scope.buffer, *pair), scope.page_and_slot(cell)
                    where = self._line_of(reads, sources)
                    finding = self._finding("never_read", whose, places, physical, waiting, part.program, where)
                    unread = reads.unread(sources, cell, dims)
                    yield finding if unread.all() else replace(finding, dims=tuple(np.flatnonzero(unread).tolist()))
            seen[cells] = False

    def wrong(self, scope: Scope, reads: Reads) -> Iterator[AccessFinding]:
        """Places that programs read and that no row they serve may have read."""
        may = np.zeros(scope.grid.num_cells, dtype=bool)
        everyone = {(seq, head) for seq in range(self._case.rows.num_seqs) for head in range(self._case.num_kv_heads)}
        for program in sorted(np.unique(reads.program).tolist(), key=self._order):
            served = self._served.get(program, everyone)
            allowed = np.concatenate([scope.allowed(pair) for pair in served])
            may[allowed] = True
            part = reads.of(program)
            bad = ~may[reads.cell[part]] | (reads.cell[part] == GAP)  # [n]
            may[allowed] = False
            if bad.any():
                yield from self._wrong(scope, reads.cell[part][bad], reads.line[part][bad], served, program)

    def explained_by(self, scope: Scope | None, loads: Sequence[Load]) -> bool:
        """Whether `loads` read what they had to, and nothing else, of a buffer with `scope`."""
        if scope is None or not loads or self._trace.cut:
            return False
        reads = resolve(loads, scope.grid)
        return not any(True for found in (self.missing, self.wrong) for _ in found(scope, reads))

    def packed(self, scope: Scope, reads: Reads) -> AccessFinding:
        """A buffer that was read as if it had no gaps."""
        program = min(np.unique(reads.program).tolist(), key=self._order)
        line = int(reads.line[reads.of(program)][0])
        nowhere, tokens = np.zeros(1, dtype=np.int64), np.array(sorted(self._tokens.get(program, ())), dtype=np.int64)
        whose = (scope.buffer, None, None)
        return self._finding("packed", whose, nowhere, (None, None), tokens, program, self._trace.lines[line])

    def _wrong(
        self, scope: Scope, cells: Ints, lines: Ints, served: set[Pair], program: int
    ) -> Iterator[AccessFinding]:
        """Wrong `cells` [n] of one program by whose they are."""
        groups: dict[tuple[str, int | None, int | None, int], list[tuple[int, int]]] = defaultdict(list)
        distinct, at = np.unique(cells, return_index=True)
        for cell, line in list(zip(distinct.tolist(), lines[at].tolist(), strict=True))[:MAX_CELLS]:
            found = Place("gap", None, None, 0) if cell == GAP else scope.locate(cell, served)
            groups[found.kind, found.sequence, found.kv_head, line].append((found.place, cell))
        tokens = np.array(sorted(self._tokens.get(program, ())), dtype=np.int64)
        for (kind, sequence, kv_head, line), members in groups.items():
            members.sort()
            physical = scope.page_and_slot(members[0][1]) if kind != "gap" else (None, None)
            places, whose = np.array([place for place, _ in members]), (scope.buffer, sequence, kv_head)
            yield self._finding(kind, whose, places, physical, tokens, program, self._trace.lines[line])

    # ---- rows and programs ----

    def _pairs(self, part: Stored) -> list[tuple[Pair, Ints]]:
        """The sequences and KV heads of the rows of `part`, each with the tokens of its rows."""
        code = self._rows.sequence[part.tokens] * self._case.num_kv_heads + part.heads // self._case.gqa_ratio  # [n]
        if (code == code[0]).all():
            return [(divmod(int(code[0]), self._case.num_kv_heads), part.tokens)]
        return [(divmod(one, self._case.num_kv_heads), part.tokens[code == one]) for one in np.unique(code).tolist()]

    def _needed(self, scope: Scope, sequence: int, tokens: Ints) -> tuple[Ints, Ints, Ints]:
        """Places [first, end) of `scope` that rows of one sequence see: the row, first and end of each range, [n] each.

        `tokens` [k] are the rows; those that see sink tokens have two ranges.
        """
        assert scope.must is not None
        low, high = scope.must[sequence]
        with_sinks = tokens[self._rows.sinks[tokens] > 0]
        last_sink = np.clip(-(-self._rows.sinks[with_sinks] // scope.tokens_per_place), low, high)
        first = np.clip(self._rows.first[tokens] // scope.tokens_per_place, low, high)
        end = np.clip(-(-self._rows.end[tokens] // scope.tokens_per_place), low, high)
        nothing = self._rows.end[tokens] <= self._rows.first[tokens]
        end = np.where(nothing, first, np.maximum(first, end))
        parts = (tokens, with_sinks), (first, np.full_like(last_sink, low)), (end, last_sink)
        rows, firsts, ends = (np.concatenate(part) for part in parts)
        return rows, firsts, ends

    def _order(self, program: int) -> tuple[int, Program]:
        """Programs as the grid counts them, not as the seed of their order has them run."""
        origin = self._trace.programs[program - 1]
        return origin.launch, origin.program

    def _closure(self, program: int) -> set[int]:
        """`program` and every program whose stores reached it."""
        found, left = {program}, [program]
        while left:
            new = self._trace.sources.get(left.pop(), set()) - found
            found |= new
            left += new
        return found

    def _line_of(self, reads: Reads, programs: set[int]) -> str:
        """The last line at which one of `programs` read this buffer; "" where none did."""
        lines = [reads.line[part] for part in map(reads.of, sorted(programs))]
        last = np.concatenate(lines)[-1:].tolist()
        return self._trace.lines[last[0]] if last else ""

    def _finding(
        self,
        kind: str,
        whose: tuple[str, int | None, int | None],
        places: Ints,
        physical: tuple[int | None, int | None],
        tokens: Ints,
        program: int | None,
        where: str,
    ) -> AccessFinding:
        origin = None if program is None else self._trace.programs[program - 1]
        buffer, sequence, kv_head = whose
        return AccessFinding(
            kind=kind,
            buffers=(buffer,),
            sequence=sequence,
            kv_head=kv_head,
            first=int(places[0]),
            last=int(places[-1]),
            count=len(places),
            page=physical[0],
            slot=physical[1],
            tokens=(int(tokens.min()), int(tokens.max())) if len(tokens) else (),
            kernel="" if origin is None else origin.kernel,
            program=None if origin is None else origin.program,
            where=where,
        )


def _unseen(seen: Flags, scope: Scope, pair: Pair, first: Ints, end: Ints) -> Ints:
    """Places in any of the ranges [first, end), each [n], that are not `seen` [num_cells]."""
    start, stop = int(first.min()), int(end.max())
    got = seen[scope.cells(pair, np.arange(start, stop))]  # [stop - start]
    if got.all():
        return np.zeros(0, dtype=np.int64)
    edges = np.zeros(len(got) + 1, dtype=np.int64)
    np.add.at(edges, first - start, 1)
    np.add.at(edges, np.maximum(end, first) - start, -1)
    return start + np.flatnonzero((edges.cumsum()[:-1] > 0) & ~got)
