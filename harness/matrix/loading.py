"""Reads one matrix file into a Matrix, or says everything that is wrong with it.

Invariant: nothing is guessed. A key, name or value that is not known is a mistake with its place, and all mistakes of
a file are reported together.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from harness.matrix.axes import AXES, TWIN_AXES
from harness.matrix.axis_types import Number, Vocabulary
from harness.matrix.checking import check_tier
from harness.matrix.conditions import read_expectations, read_rules
from harness.matrix.dispatching import read_must_run, read_unreached
from harness.matrix.matrix import FAULTS, NOISE_FLOORS, Matrix, Values
from harness.matrix.reading import Entries, Reader
from harness.matrix.rows import SHARED_ROWS, RowMix, parse_mixes
from harness.matrix.source import Mistake, Source, Span, items, one_of, span_of, text, unknown_keys
from harness.matrix.tiers import read_tiers

KEYS: Mapping[str, str] = {
    "matrix": "name of the matrix; ids begin with it",
    "about": "one sentence: what is swept, and why",
    "kernels": "the kernels under test",
    "fixed": "axes with one value",
    "axes": "axes with several values; the first is the plain one, which list entries get",
    "row_mixes": "batches by name, for the axis 'rows'; more are shared in rows.yaml",
    "constraints": "conditions that every case meets",
    "must_see": "faults that every case must be able to see; a case that cannot is BLIND",
    "margin": "how many tolerances a fault of must_see has to move some output by; 8 unless given",
    "legacy_tolerance": "{atol, rtol} of another test suite: attnreg audit measures with it, runs do not",
    "noise_floor": "report or fail: compare each case's error with that of its twin with one page per sequence",
    "twins": "axes in which the twin of each case, with another value, must give the same bits",
    "must_run": "the device kernels that cases meeting a condition launch; another one is a silent fallback",
    "unreached": "branches of a kernel's dispatch that the sweep leaves out, each with a reason",
    "tiers": "which cases run when",
    "expect": "known failures, each with a reason, a link and a date",
}
REQUIRED_KEYS = ("matrix", "about", "kernels", "tiers")
LEGACY_KEYS = ("atol", "rtol")
_NAME = re.compile(r"[a-z][a-z0-9_]*")


def load(
    path: Path | str, *, kernel_names: Collection[str] | None = None, writer_names: Collection[str] | None = None
) -> Matrix:
    """The matrix at `path`; names of kernels and writers are checked where `kernel_names`, `writer_names` are given.

    Raises MatrixError with all mistakes in the file (or in the shared rows beside it).
    """
    path = Path(path)
    source = Source.read(path)
    vocabulary = Vocabulary(source, kernel_names, shared_mixes(path.parent), writer_names)
    return _Loader(source, vocabulary).run(path)


def shared_mixes(folder: Path) -> dict[str, RowMix]:
    """The row mixes of rows.yaml in `folder`; none where there is no such file. Raises MatrixError."""
    path = folder / SHARED_ROWS
    if not path.exists():
        return {}
    source = Source.read(path)
    mixes = parse_mixes(source, source.root(), SHARED_ROWS)
    source.finish()
    return mixes


class _Loader(Reader):
    """The sections of a matrix, each noting its mistakes before the next is read."""

    def run(self, path: Path) -> Matrix:
        with self.source.collect():
            return self._read(path, self.source.entries(self.source.root(), "a matrix"))
        raise self.source.error()

    def _read(self, path: Path, entries: Entries) -> Matrix:
        for mistake in unknown_keys(entries, KEYS, "key"):
            self.source.add(mistake)
        for key in REQUIRED_KEYS:
            if key not in entries:
                self.source.add(Mistake(Span(1, 1), f"the matrix has no '{key}'"))
        name = about = ""
        with self.source.collect():
            name = self._name(entries)
        with self.source.collect():
            about = text(entries["about"][1], "about") if "about" in entries else ""
        self._mixes(entries)
        values = self._values(entries)
        tiers = read_tiers(self, entries)  # before expressions: rows defined in place may be named there
        rules = tuple(read_rules(self, entries))
        must_see = tuple(self._must_see(entries))
        expectations = tuple(read_expectations(self, entries))
        margin, legacy_tolerance = self._margin(entries), self._legacy_tolerance(entries)
        noise_floor, twins = self._noise_floor(entries), self._twins(entries)
        must_run = tuple(read_must_run(self, entries))
        unreached = tuple(read_unreached(self, entries))
        self.source.finish()
        matrix = Matrix(
            path,
            name,
            about,
            values,
            rules,
            must_see,
            tiers,
            expectations,
            self.source,
            self.spans,
            margin,
            legacy_tolerance,
            twins,
            must_run,
            unreached,
            noise_floor,
        )
        noted: set[Span] = set()
        for tier in tiers.values():  # what is wrong in one place is wrong once, however many tiers meet it
            for mistake in [m for m in check_tier(matrix, tier) if m.span not in noted]:
                noted.add(mistake.span)
                self.source.add(mistake)
        self.source.finish()
        return matrix

    def _name(self, entries: Entries) -> str:
        if "matrix" not in entries:
            return ""
        node = entries["matrix"][1]
        name = text(node, "matrix")
        if not _NAME.fullmatch(name):
            raise Mistake(span_of(node), f"matrix is a name of a-z, 0-9 and _, not '{name}'")
        return name

    def _mixes(self, entries: Entries) -> None:
        if "row_mixes" not in entries:
            return
        for name, mix in parse_mixes(self.source, entries["row_mixes"][1], "row_mixes").items():
            if name in self.vocabulary.mixes:
                self.source.add(Mistake(span_of(entries["row_mixes"][0]), f"row mix '{name}' is also in {SHARED_ROWS}"))
            self.vocabulary.mixes[name] = mix

    def _values(self, entries: Entries) -> Values:
        found: dict[str, tuple[Any, ...]] = {}
        with self.source.collect():
            if "kernels" in entries:
                found["kernel"] = self.list_of("kernel", entries["kernels"][1], "kernels")
        for section, several in (("fixed", False), ("axes", True)):
            with self.source.collect():
                if section not in entries:
                    continue
                for axis, key, node in self.axes_of(self.source.entries(entries[section][1], section)):
                    with self.source.collect():
                        if axis == "kernel":
                            raise Mistake(span_of(key), "the kernels of a matrix go under 'kernels'")
                        if axis in found:
                            raise Mistake(span_of(key), f"axis '{axis}' already has values elsewhere")
                        if several:
                            found[axis] = self.list_of(axis, node, f"axes.{axis}")
                        else:
                            found[axis] = (self.value(axis, node),)
        return {axis: found[axis] for axis in AXES if axis in found}

    def _must_see(self, entries: Entries) -> Iterator[str]:
        with self.source.collect():
            for node in items(entries["must_see"][1], "must_see") if "must_see" in entries else ():
                with self.source.collect():
                    yield one_of(text(node, "a fault"), FAULTS, "fault", span_of(node))

    def _margin(self, entries: Entries) -> float:
        margin = Matrix.margin
        with self.source.collect():
            if "margin" in entries:
                margin = self.number(entries["margin"][1], "margin", Number(1, whole=False))
        return margin

    def _twins(self, entries: Entries) -> tuple[str, ...]:
        found: list[str] = []
        with self.source.collect():
            for node in items(entries["twins"][1], "twins") if "twins" in entries else ():
                with self.source.collect():
                    axis = one_of(text(node, "an axis"), TWIN_AXES, "axis of twins", span_of(node))
                    if axis in found:
                        raise Mistake(span_of(node), f"twins lists {axis} twice")
                    found.append(axis)
        return tuple(found)

    def _noise_floor(self, entries: Entries) -> str:
        found = Matrix.noise_floor
        with self.source.collect():
            if "noise_floor" in entries:
                node = entries["noise_floor"][1]
                found = one_of(text(node, "noise_floor"), NOISE_FLOORS, "noise_floor", span_of(node))
        return found

    def _legacy_tolerance(self, entries: Entries) -> tuple[float, float] | None:
        if "legacy_tolerance" not in entries:
            return None
        found: tuple[float, float] | None = None
        with self.source.collect():
            node = entries["legacy_tolerance"][1]
            fields = self.source.entries(node, "legacy_tolerance")
            for mistake in unknown_keys(fields, LEGACY_KEYS, "tolerance"):
                self.source.add(mistake)
            if missing := [key for key in LEGACY_KEYS if key not in fields]:
                raise Mistake(span_of(node), f"legacy_tolerance has no {' and no '.join(missing)}")
            atol, rtol = (self.number(fields[key][1], key, Number(0, whole=False)) for key in LEGACY_KEYS)
            found = atol, rtol
        return found
