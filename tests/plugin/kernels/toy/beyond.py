"""Honest kernels that touch memory beyond one of their buffers first, and make nothing of it.

On a CPU the address is really dereferenced; on a GPU a compiled kernel does it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch

from harness.kernel.arguments import LaunchArguments
from harness.kernel.buffer_map import Span

from .toy import honest

FAR = 4 << 20  # bytes: more than a GPU maps before a small buffer


def _touching(name: str, offset: int = 0, *, store: bool = False) -> Callable[[LaunchArguments], None]:
    """A kernel that reads (or stores) the 4 bytes `offset` bytes behind the last element of a buffer."""

    def launch(args: LaunchArguments) -> None:
        scratch = name == "workspace"
        tensor: torch.Tensor = args.workspace("scratch", (2, 4), torch.float32) if scratch else getattr(args, name)
        if tensor.is_cuda:
            from .on_device import touch

            touch(tensor, Span.of(name, tensor).size + offset, store=store)
        else:
            span = Span.of(name, tensor)
            there, here = ctypes.c_void_p(span.start + span.size + offset), ctypes.create_string_buffer(4)
            ctypes.memmove(*((there, here) if store else (here, there)), 4)
        honest(args)

    return launch


block_table = _touching("block_table")
seq_lens = _touching("seq_lens")
query_start_loc = _touching("query_start_loc")
q = _touching("q")
k_cache = _touching("k_cache")
v_cache = _touching("v_cache")
v_scale = _touching("v_scale")
out = _touching("out", store=True)
workspace = _touching("workspace", store=True)
far_behind = _touching("block_table", 1 << 20)
before = _touching("q", -FAR)
