"""Fences around what a kernel is handed: every tensor of the launch lies in memory with nothing mapped around it.

Invariant: arguments and outputs are, bit for bit, what they were, strides and gaps included; only their addresses
differ. A touch before or behind a buffer, beyond what the contract declares as an over-read, ends the process or the
device context. Buffers of boundary probes stay where their addresses matter.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from harness.cache.fence import fenced
from harness.kernel.arguments import LaunchArguments
from harness.kernel.guarded import POISON, GuardedOutput
from harness.kernel.launch import input_tensors
from harness.kernel.reaching import ReachingOutput
from harness.kernel.writer import WriterArguments

_DEAD = (torch.uint8, 0xFF)  # around inputs: NaN in every float type here, -1 in indices


@dataclass(frozen=True)
class Fences:
    """Which buffers are fenced. only: some, by argument name; None: every one."""

    on: bool = False
    only: frozenset[str] | None = None

    def around(self, names: Collection[str]) -> bool:
        """Whether memory that holds the buffers `names` is fenced."""
        return self.on and (self.only is None or not self.only.isdisjoint(names))


NO_FENCES = Fences()
Handed = tuple[LaunchArguments, tuple[GuardedOutput, ...], frozenset[str]]


def fence_launch(
    fences: Fences,
    args: LaunchArguments,
    outputs: tuple[GuardedOutput, ...],
    *,
    fixed: Collection[str],
    room: Mapping[str, int],
) -> Handed:
    """`args` and `outputs` in fenced memory, and the names of the buffers that lie there.

    fixed: buffers that stay where they are. room: elements behind the end of a buffer that may be read.
    Raises MemoryError, and UsageError where there is no virtual memory.
    """
    moved = _moved(fences, input_tensors(args), fixed, room)
    guarded = []
    for output in outputs:
        if fences.around((output.name,)) and not isinstance(output, ReachingOutput):
            output = _fenced_output(output)
            moved[output.name] = output.tensor
        guarded.append(output)
    return replace(args, **moved), tuple(guarded), frozenset(moved)


def fence_writer(
    fences: Fences, args: WriterArguments, *, fixed: Collection[str], room: Mapping[str, int]
) -> tuple[WriterArguments, frozenset[str]]:
    """What a writer is handed, in fenced memory, the caches that it stores to included; and the buffers that lie there.

    fixed: buffers that stay where they are. room: elements behind the end of a buffer that attention may read later.
    Raises as fence_launch.
    """
    given = {**input_tensors(args), "k_cache": args.k_cache, "v_cache": args.v_cache}
    moved = _moved(fences, given, fixed, room)
    return replace(args, **moved), frozenset(moved)


def _moved(
    fences: Fences, given: Mapping[str, torch.Tensor], fixed: Collection[str], room: Mapping[str, int]
) -> dict[str, Any]:
    """Those of `given` that are fenced, where they lie then."""
    moved: dict[str, Any] = {}
    for shared in _by_storage(given):
        if fences.around(shared) and shared.keys().isdisjoint(fixed):
            behind = max(room.get(name, 0) * tensor.element_size() for name, tensor in shared.items())
            moved |= fenced(shared, fill=_DEAD, room=behind).views
    return moved


def _by_storage(tensors: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Tensors of one storage stay together: a store to one may be a store to the other."""
    groups: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(tensor.untyped_storage().data_ptr() or -id(tensor), {})[name] = tensor
    return list(groups.values())


def _fenced_output(output: GuardedOutput) -> GuardedOutput:
    """An output whose red zones are all that is mapped around it."""
    integer = POISON[output.tensor.element_size()][0]
    found = fenced({output.name: output.tensor}, fill=(integer, output.poison))
    return GuardedOutput(output.name, found.views[output.name], found.memory.view(integer), output.poison)
