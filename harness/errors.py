"""Every way attnreg refuses its input, as a type. Each is one clear message; none is shown with a traceback."""

from __future__ import annotations


class AttnregError(Exception):
    """Base of all errors attnreg raises on purpose."""


class UsageError(AttnregError):
    """A command-line option or an argument that cannot be used as given."""


class KernelNotFound(AttnregError):
    """A kernel name, folder or entry point that leads nowhere."""


class LawError(AttnregError):
    """A data law that cannot keep its promise for this case (e.g. a needle under a soft cap)."""


class PlacementError(AttnregError):
    """A placement or layout that does not fit the lengths of the case."""


class SetupBug(AttnregError):
    """What is about to be handed to the kernel violates the kernel's contract: the test is wrong, not the kernel.

    `tensor` names the argument, `expected` and `got` say what the contract wants and what was built, `hint` says how
    such a mistake usually comes about.
    """

    def __init__(self, tensor: str, expected: str, got: str, hint: str = "") -> None:
        self.tensor, self.expected, self.got, self.hint = tensor, expected, got, hint
        super().__init__(f"{tensor}: expected {expected}, got {got}" + (f" ({hint})" if hint else ""))


class KernelRaised(AttnregError):
    """The kernel under test raised an exception of its own; the cause is chained."""


class OutOfMemory(AttnregError):
    """The kernel under test asked for memory of host or device that could not be had; the cause is chained."""


class DeviceMemoryError(MemoryError):
    """Memory of a device that a pool could not have; a MemoryError of any other kind is about the host's."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
