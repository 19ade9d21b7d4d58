"""What a strict session knows: its buffers, the launches it saw, and what kernels did wrong.

Invariant: every access is checked here before it happens; a `MemoryFault` leaves memory as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from harness.interpreter.errors import MemoryFault, OutOfBounds, ReadOnlyStore, Violation
from harness.interpreter.frames import kernel_frames, kernel_line
from harness.interpreter.memory import Addresses, Buffer, Regions, WriterMap, describe
from harness.interpreter.trace import Mask, Origin, Pointers, Program, Trace

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel that ran, its grid, and the seed that ordered its programs."""

    kernel: str
    grid: Program
    order_seed: tuple[int, int]

    def programs(self) -> list[Program]:
        """All programs of the grid in the order they run."""
        x, y, z = self.grid
        order = np.random.default_rng(self.order_seed).permutation(x * y * z)
        return [(i // (y * z), i // z % y, i % z) for i in order.tolist()]


class Session:
    """Launches, violations and the memory of one `strict_interpreter` context.

    buffers: tensors by name; None: the tensors each launch is given. outputs: names among them that may be stored to;
    None: all. room: elements behind the end of a buffer that may be loaded too. trace: filled with what programs load;
    None: nothing is kept. workspaces: writable buffers by name, asked for as each launch begins. A launch tensor of an
    allocation that no buffer shares is a workspace as well: writable, for that launch.
    """

    def __init__(
        self,
        buffers: Mapping[str, torch.Tensor] | None,
        outputs: Collection[str] | None,
        program_order_seed: int,
        room: Mapping[str, int],
        trace: Trace | None,
        workspaces: Callable[[], Mapping[str, torch.Tensor]] | None,
    ) -> None:
        given = buffers or {}
        unknown = set(outputs or ()) - given.keys()
        if unknown:
            raise ValueError(f"outputs name no buffer: {sorted(unknown)}; buffers: {sorted(given)}")
        self.launches: list[Launch] = []
        self.violations: list[Violation] = []
        self.cross_launch_overwrites = 0  # elements stored that an earlier launch had stored
        self.program_order_seed = program_order_seed
        self._given = [Buffer.of(n, t, outputs is None or n in outputs, room.get(n, 0)) for n, t in given.items()]
        self._workspaces = workspaces
        self._with_gaps: list[Buffer] = []  # of the running launch, writable
        self._trace = trace
        self._watched: dict[int, list[str]] = {}  # readable region -> watched buffers in it
        self._fed: list[_WritableLoad] = []  # of the running launch
        self._writers = WriterMap()
        self._seen: set[tuple[str, int, str]] = set()  # (kind, launch, where) of recorded violations
        self._serial = 0
        self._launch_serial = 1
        self._program: Program = (0, 0, 0)
        self._buffers: list[Buffer] = []
        self._readable = self._writable = Regions(())

    # ---- launches ----

    def begin_launch(self, kernel: str, grid: Program, tensors: Mapping[str, torch.Tensor]) -> Launch:
        """Record a launch and register its workspaces; the caller runs `Launch.programs()` in order."""
        scratch = {} if self._workspaces is None else self._workspaces()
        named = self._given + [Buffer.of(name, t, True) for name, t in scratch.items()]
        allocations = {b.storage for b in named}
        arguments = [Buffer.of(name, t, True) for name, t in tensors.items()]
        self._buffers = named + [b for b in arguments if b.storage not in allocations]
        self._with_gaps = [buffer for buffer in named if buffer.writable and buffer.has_gaps]
        self._readable = Regions(self._buffers)
        self._writable = Regions(b for b in self._buffers if b.writable)
        self._launch_serial = self._serial + 1
        self._watched, self._fed = self._watch(), []
        launch = Launch(kernel, grid, (self.program_order_seed, len(self.launches)))
        self.launches.append(launch)
        return launch

    def begin_program(self, program: Program) -> None:
        self._serial += 1
        self._program = program
        if self._trace is not None:
            launch = len(self.launches) - 1
            self._trace.programs.append(Origin(self.launches[launch].kernel, launch, program))

    def end_launch(self) -> None:
        """All programs of the launch have run: look for elements that one loaded and another stored."""
        for load in self._fed if self._trace is not None and not self._trace.atomics else ():
            writers = self._last_writers(load.region, load.addresses, load.size)  # [n, elements]
            raced = ((writers >= self._launch_serial) & (writers != load.serial)).any(axis=1)  # [n]
            if raced.any():
                place = describe(self._buffers, int(load.addresses[raced.argmax()]), load.size)
                said = f"loaded {int(raced.sum())} elements that another program of this launch stores, first {place}"
                self._note(
                    Violation("race", said, self.launches[-1].kernel, len(self.launches) - 1, load.program, load.where)
                )

    def writers(self, name: str) -> npt.NDArray[np.int32]:
        """Number of the program that stored each element of buffer `name` last, 0 for none: int32 of its shape."""
        buffer = next(b for b in self._given if b.name == name)
        region = Regions(b for b in self._given if b.writable)
        index = region.containing(buffer.start, buffer.start, 1) if buffer.start < buffer.end else -1
        if index < 0:
            return np.zeros(buffer.shape, dtype=np.int32)
        return self._writers.view(region.starts[index], region.ends[index], region.units[index], buffer)

    # ---- accesses ----

    def check(self, kind: str, pointers: Pointers, mask: Mask | None, size: int) -> None:
        """Check the unmasked lanes of a load, store or atomic of `size` bytes per lane.  pointers, mask: one shape

        Raises OutOfBounds, or ReadOnlyStore for a store to an input; records double stores.
        """
        addresses = pointers.reshape(-1) if mask is None else pointers[mask]  # [n]
        if addresses.size == 0:
            return
        regions = self._readable if kind == "load" else self._writable
        lowest, highest = int(addresses.min()), int(addresses.max())
        index = regions.containing(lowest, highest, size)
        placed = None
        if index < 0:
            placed = regions.place(addresses, size)  # [n]
            outside = placed < 0
            if outside.any():
                raise self._fault(kind, int(addresses[outside.argmax()]), size)
        touched = [index] if placed is None else np.unique(placed).tolist()
        if kind == "store":
            for i in touched:
                self._count_stores(i, addresses if placed is None else addresses[placed == i], size)
        elif self._trace is not None and kind == "atomic":
            self._trace.atomics = True
        elif self._trace is not None:
            for i in touched:
                self._follow(
                    self._trace, i, pointers, mask if placed is None else _where(pointers, mask, placed == i), size
                )

    def _follow(self, trace: Trace, region: int, pointers: Pointers, mask: Mask | None, size: int) -> None:
        """Keep a load from one readable region: as it is of a watched buffer, as its writers of writable memory."""
        if names := self._watched.get(region):
            trace.load(names, self._serial, pointers, mask, kernel_frames())
            return
        start = self._readable.starts[region]
        writable = self._writable.containing(start, start, 1)
        if writable < 0:
            return
        addresses = pointers.reshape(-1) if mask is None else pointers[mask]
        trace.feed(self._serial, self._last_writers(writable, addresses, size))
        self._fed.append(_WritableLoad(writable, addresses, size, self._serial, self._program, kernel_line()))

    def _watch(self) -> dict[int, list[str]]:
        watched: dict[int, list[str]] = {}
        for buffer in self._given if self._trace is not None else ():
            if self._trace is not None and buffer.name in self._trace.watched and buffer.start < buffer.end:
                region = self._readable.containing(buffer.start, buffer.start, 1)
                watched.setdefault(region, []).append(buffer.name)
        return watched

    def _last_writers(self, region: int, addresses: Addresses, size: int) -> npt.NDArray[np.int32]:
        start, end, unit = self._writable.starts[region], self._writable.ends[region], self._writable.units[region]
        return self._writers.last(start, end, unit, addresses, size)

    def _count_stores(self, index: int, addresses: Addresses, size: int) -> None:
        start, end, unit = self._writable.starts[index], self._writable.ends[index], self._writable.units[index]
        for buffer in self._with_gaps:
            if start == buffer.start and end == buffer.end and not (held := buffer.holds(addresses)).all():
                place = describe(self._buffers, int(addresses[held.argmin()]), size)
                self.record("stray_store", f"stored {int((~held).sum())} elements outside its rows, first {place}")
        counts = self._writers.store(start, end, unit, addresses, size, self._serial, self._launch_serial)
        self.cross_launch_overwrites += counts.by_earlier_launch
        if counts.by_other_program:
            place = describe(self._buffers, counts.first_clash, unit)
            self.record(
                "double_store", f"stored {counts.by_other_program} elements that another program stored, first {place}"
            )

    def _fault(self, kind: str, address: int, size: int) -> MemoryFault:
        place = describe(self._buffers, address, size)
        if kind != "load" and self._readable.containing(address, address, size) >= 0:
            return ReadOnlyStore(self.record("read_only_store", f"{kind} of {size} bytes to an input, {place}"))
        return OutOfBounds(self.record("out_of_bounds", f"{kind} of {size} bytes {place}"))

    # ---- violations ----

    def record(self, kind: str, message: str) -> Violation:
        """Record a violation of the running kernel, once per kind, launch and source line."""
        launch = len(self.launches) - 1
        return self._note(Violation(kind, message, self.launches[launch].kernel, launch, self._program, kernel_line()))

    def _note(self, violation: Violation) -> Violation:
        key = (violation.kind, violation.launch, violation.where)
        if key not in self._seen:
            self._seen.add(key)
            self.violations.append(violation)
        return violation


@dataclass(frozen=True)
class _WritableLoad:
    """A load from memory that programs may store to."""

    region: int  # of the writable ones
    addresses: Addresses  # [n]
    size: int
    serial: int
    program: Program
    where: str


def _where(pointers: Pointers, mask: Mask | None, chosen: npt.NDArray[np.bool_]) -> Mask:
    """The mask of those unmasked lanes that are `chosen` [n]."""
    result = np.zeros(pointers.shape, dtype=bool)
    result[np.ones_like(result) if mask is None else mask] = chosen
    return result
