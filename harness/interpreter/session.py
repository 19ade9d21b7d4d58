"""What a strict session knows: its buffers, the launches it saw, and what kernels did wrong.

Invariant: every access is checked here before it happens; a `MemoryFault` leaves memory as it was.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from harness.interpreter.errors import MemoryFault, OutOfBounds, ReadOnlyStore, Violation
from harness.interpreter.memory import Addresses, Buffer, Regions, WriterMap, describe

if TYPE_CHECKING:
    import torch

Program = tuple[int, int, int]


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


@dataclass(frozen=True)
class Access:
    """The unmasked lanes of one load, store or atomic of one program."""

    kind: str  # load | store | atomic
    addresses: Addresses  # [n]
    size: int  # bytes per lane
    launch: int  # index into Session.launches
    program: Program
    where: Callable[[], str]  # file:line in function; ask during the call only


class AccessHook(Protocol):
    """Sees every access that passed the checks, before it happens."""

    def access(self, access: Access) -> None: ...


class Session:
    """Launches, violations and the memory of one `strict_interpreter` context.

    buffers: tensors by name; None: the tensors each launch is given. outputs: names among them that may be stored to;
    None: all. A launch tensor of an allocation that no buffer shares is a workspace: writable, for that launch.
    """

    def __init__(
        self,
        buffers: Mapping[str, torch.Tensor] | None,
        outputs: Collection[str] | None,
        program_order_seed: int,
        hook: AccessHook | None,
    ) -> None:
        given = buffers or {}
        unknown = set(outputs or ()) - given.keys()
        if unknown:
            raise ValueError(f"outputs name no buffer: {sorted(unknown)}; buffers: {sorted(given)}")
        self.launches: list[Launch] = []
        self.violations: list[Violation] = []
        self.cross_launch_overwrites = 0  # elements stored that an earlier launch had stored
        self.program_order_seed = program_order_seed
        self._given = [Buffer.of(n, t, outputs is None or n in outputs) for n, t in given.items()]
        self._hook = hook
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
        allocations = {b.storage for b in self._given}
        arguments = [Buffer.of(name, t, True) for name, t in tensors.items()]
        self._buffers = self._given + [b for b in arguments if b.storage not in allocations]
        self._readable = Regions(self._buffers)
        self._writable = Regions(b for b in self._buffers if b.writable)
        self._launch_serial = self._serial + 1
        launch = Launch(kernel, grid, (self.program_order_seed, len(self.launches)))
        self.launches.append(launch)
        return launch

    def begin_program(self, program: Program) -> None:
        self._serial += 1
        self._program = program

    # ---- accesses ----

    def check(self, kind: str, addresses: Addresses, size: int) -> None:
        """Check the unmasked lanes of a load, store or atomic.  addresses: [n] uint64

        Raises OutOfBounds, or ReadOnlyStore for a store to an input; records double stores.
        """
        if addresses.size == 0:
            return
        regions = self._readable if kind == "load" else self._writable
        lowest, highest = int(addresses.min()), int(addresses.max())
        index = regions.containing(lowest, highest, size)
        if index < 0:
            placed = regions.place(addresses, size)  # [n]
            outside = placed < 0
            if outside.any():
                raise self._fault(kind, int(addresses[outside.argmax()]), size)
        if kind == "store":
            if index >= 0:
                self._count_stores(index, addresses, size)
            else:
                for i in np.unique(placed).tolist():
                    self._count_stores(i, addresses[placed == i], size)
        if self._hook is not None:
            self._hook.access(Access(kind, addresses, size, len(self.launches) - 1, self._program, kernel_line))

    def _count_stores(self, index: int, addresses: Addresses, size: int) -> None:
        start, end, unit = self._writable.starts[index], self._writable.ends[index], self._writable.units[index]
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
        violation = Violation(kind, message, self.launches[launch].kernel, launch, self._program, kernel_line())
        if (kind, launch, violation.where) not in self._seen:
            self._seen.add((kind, launch, violation.where))
            self.violations.append(violation)
        return violation


_HERE = str(Path(__file__).parent)


def kernel_line() -> str:
    """file:line of the running line of a kernel or device function: whoever called Triton's and our machinery."""
    import triton

    machinery = (_HERE, str(Path(triton.__file__).parent))
    frame = sys._getframe(1)
    for inside in (False, True):  # out of a hook, if one asks, then out of the machinery
        while frame.f_back is not None and frame.f_code.co_filename.startswith(machinery) is inside:
            frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"
