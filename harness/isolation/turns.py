"""One large case at a time on a device, as the workers that share it would together ask for more memory than it has.

Invariant: a case waits before its time counts; however its process ends, the turn is given back: it is the lock of a
file.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from harness.case import Case
from harness.dtypes import element_type
from harness.isolation.devices import CUDA, HIP

LARGE = 1 << 30  # bytes


@contextmanager
def turn(case: Case, folder: Path, environment: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Wait until no other large case of the session is on the device; nothing where `case` is small.

    folder: of the session, the same for all of its workers. environment: what says which device that is.
    """
    if not is_large(case):
        yield
        return
    with lock_of(folder, environment).open("w", encoding="ascii") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)  # of this process alone: what a kernel forks does not inherit it
        yield


def lock_of(folder: Path, environment: Mapping[str, str]) -> Path:
    """The file of the turn of a process with the variables `environment`, which say what device it sees."""
    device = "-".join(environment.get(variable, "") for variable in (CUDA, HIP))
    return folder / f"turn{device}".replace("/", "_")


def is_large(case: Case) -> bool:
    """Whether the KV cache of `case` may take more than LARGE bytes of memory of its own."""
    if case.pool == "aliased":
        return False
    if case.boundary is not None and case.boundary_target in ("kv", "k", "v"):
        return case.pool == "dense"  # it spans the boundary
    placed = max((page for pages in case.placement.pages for page in pages), default=0) + 1
    tokens = max((case.num_pages or placed) * case.page_size, sum(case.rows.seq_lens))
    token = case.num_kv_heads * (case.head_size + case.value_size) * element_type(case.stored_dtype).size
    return tokens * token > LARGE
