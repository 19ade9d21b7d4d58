"""Fences around what a kernel is handed: every tensor of the launch, workspaces too, has nothing mapped around it.

Invariant: arguments and outputs are, bit for bit, what they were, strides and gaps included; only their addresses
differ. A touch before or behind a buffer, beyond what the contract declares as an over-read, ends the process or the
device context. Buffers of boundary probes stay where their addresses matter.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from harness.cache.fence import fenced
from harness.dtypes import ELEMENT_TYPES
from harness.kernel.arguments import LaunchArguments
from harness.kernel.guarded import GuardedOutput
from harness.kernel.launch import input_tensors
from harness.kernel.reaching import ReachingOutput
from harness.kernel.workspace import Workspaces
from harness.kernel.writer import WriterArguments


@dataclass(frozen=True)
class Fences:
    """Which buffers are fenced. only: some, by argument name; None: every one. front: right behind the fence before
    them, not right before the one behind.
    """

    on: bool = False
    only: frozenset[str] | None = None
    front: bool = False

    def around(self, names: Collection[str]) -> bool:
        """Whether memory that holds the buffers `names` is fenced."""
        return self.on and (self.only is None or not self.only.isdisjoint(names))

    def enclose(self, output: GuardedOutput) -> bool:
        """Whether an output or workspace is fenced: those of boundary probes are not."""
        return self.around((output.name,)) and not isinstance(output, ReachingOutput)


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
    """`args` and `outputs` in fenced memory, and the names of the buffers that lie there. Workspaces follow as the
    kernel takes them.

    fixed: buffers that stay where they are. room: elements behind the end of a buffer that may be read.
    Raises MemoryError, and UsageError where there is no virtual memory.
    """
    moved = _moved(fences, input_tensors(args), fixed, room)
    outputs = tuple(fence_output(fences, output) for output in outputs)
    moved |= {output.name: output.tensor for output in outputs if fences.enclose(output)}
    names = frozenset(moved)
    if isinstance(args.allocator, Workspaces):
        moved["allocator"] = replace(args.allocator, prepare=functools.partial(fence_output, fences))
    return replace(args, **moved), outputs, names


def fence_output(fences: Fences, output: GuardedOutput) -> GuardedOutput:
    """An output or workspace whose red zones are all that is mapped around it, where it is to be fenced."""
    if not fences.enclose(output):
        return output
    red_zone = (output.allocation.dtype, output.poison)
    found = fenced({output.name: output.tensor}, fill=red_zone, front=fences.front)
    return replace(output, tensor=found.views[output.name], allocation=found.memory.view(red_zone[0]))


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
            fill = (torch.int8, _poison_byte(shared.values()))
            moved |= fenced(shared, fill=fill, room=behind, front=fences.front).views
    return moved


def _by_storage(tensors: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Tensors of one storage stay together: a store to one may be a store to the other."""
    groups: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(tensor.untyped_storage().data_ptr() or -id(tensor), {})[name] = tensor
    return list(groups.values())


def _poison_byte(tensors: Iterable[torch.Tensor]) -> int:
    """What lies around inputs: NaN where the type has one, -1 between indices."""
    known = {t.torch: t.poison for t in ELEMENT_TYPES.values() if t.size == 1}
    return next((known[tensor.dtype] for tensor in tensors if tensor.dtype in known), -1)
