"""What the strict interpreter refuses, and how it reports what a kernel did wrong.

Invariant: refusals concern the set-up; a `MemoryFault` concerns the kernel and is raised before memory is touched.
"""

from __future__ import annotations

from dataclasses import dataclass

from harness.errors import AttnregError


class InterpreterUnsupported(AttnregError):
    """A Triton that is missing or not one the strict interpreter is proved on, or a request it cannot meet."""


class InterpreterNotReady(AttnregError):
    """Triton was imported before the interpreter was switched on (or off)."""


class NestedSession(AttnregError):
    """A strict session was opened inside another."""


@dataclass(frozen=True)
class Violation:
    """Something a kernel did that no correct kernel does, whatever its numbers.

    kind: out_of_bounds | read_only_store | double_store | stray_store | race | wrong_hint.
    """

    kind: str
    message: str  # what happened, without place
    kernel: str
    launch: int  # index into Session.launches
    program: tuple[int, int, int]
    where: str  # file:line in function

    def __str__(self) -> str:
        return f"{self.kernel}: {self.message} (program {self.program}, {self.where})"


class MemoryFault(AttnregError):
    """An access that would have been wrong; `violation` holds the same as data."""

    def __init__(self, violation: Violation) -> None:
        self.violation = violation
        super().__init__(str(violation))


class OutOfBounds(MemoryFault):
    """A load or store at an address inside no registered buffer."""


class ReadOnlyStore(MemoryFault):
    """A store to a buffer registered as an input."""
