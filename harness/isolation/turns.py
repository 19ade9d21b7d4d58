"""One large case at a time on a device, as the workers that share it would together ask for more memory than it has.

Invariant: a case waits before its time counts; however its process ends, the turn is given back: it is the lock of a
file.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.case import Case
from harness.dtypes import element_type
from harness.isolation.devices import CUDA, HIP

LARGE = 1 << 30  # bytes


@contextmanager
def turn(case: Case, folder: Path) -> Iterator[None]:
    """Wait until no other large case of the session is on the device of this process; nothing where `case` is small.

    folder: of the session, the same for all of its workers.
    """
    if not is_large(case):
        yield
        return
    device = "-".join(os.environ.get(variable, "") for variable in (CUDA, HIP))  # what tells its workers apart
    with (folder / f"turn{device}").open("w", encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_large(case: Case) -> bool:
    """Whether the KV cache of `case` may take more than LARGE bytes of memory of its own."""
    if case.pool == "aliased":
        return False
    if case.boundary is not None:
        return case.pool == "dense"  # it spans the boundary
    placed = max((page for pages in case.placement.pages for page in pages), default=0) + 1
    pages = placed if case.num_pages is None else case.num_pages
    token = case.num_kv_heads * (case.head_size + case.value_size) * element_type(case.stored_dtype).size
    return pages * case.page_size * token > LARGE
