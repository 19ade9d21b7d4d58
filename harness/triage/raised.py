"""Where a kernel raised: the exception, and the innermost line of the kernel's own code that led to it.

Invariant: the line told lies under the kernel's home (its folder of kernels, or its package); where none does, no line
is told.
"""

from __future__ import annotations

import linecache
import re
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import AttnregError
from harness.kernel.failures import cause_of, message_of
from harness.store.plain import plain_dict

MAX_LINES = 6  # of the exception's message


@dataclass(frozen=True)
class Place:
    file: Path
    line: int
    function: str

    def describe(self, home: Path) -> str:
        shown = self.file.name if self.file == home else self.file.relative_to(home)
        return f"{shown}:{self.line} in {self.function}"


def explain_raised(error: AttnregError, home: Path | None) -> dict[str, Any]:
    """Explanation of what a kernel whose code lies under `home` raised; `error` is ours, with the cause chained."""
    if error.__cause__ is None:
        return plain_dict({"rows": {"why": [str(error)]}, "summary": str(error), "shape": type(error).__name__})
    cause = cause_of(error.__cause__)
    message = message_of(cause).splitlines()
    rows = {"raised": [str(error)]}
    if len(message) > 1:
        rows["message"] = message[:MAX_LINES] + ["..."] * (len(message) > MAX_LINES)
    place = find_place(cause, home) if home is not None else None
    at = ""
    if place is not None and home is not None:
        at = place.describe(home)
        rows["at"] = [at, linecache.getline(str(place.file), place.line).strip()]
    return plain_dict(
        {
            "rows": rows,
            "summary": f"{error}, at {at}" if at else str(error),
            "shape": f"{type(cause).__name__} {at}",
        }
    )


def find_place(cause: BaseException, home: Path) -> Place | None:
    """The innermost line under `home` that `cause` came by: of the kernel where it did not compile or parse."""
    if isinstance(cause, SyntaxError) and cause.filename and Path(cause.filename).is_relative_to(home):
        return Place(Path(cause.filename), cause.lineno or 1, "<module>")
    if place := _uncompiled(cause, home):
        return place
    frames = [f for f in traceback.extract_tb(cause.__traceback__) if Path(f.filename).is_relative_to(home)]
    return Place(Path(frames[-1].filename), frames[-1].lineno or 1, frames[-1].name) if frames else None


def _uncompiled(cause: BaseException, home: Path) -> Place | None:
    """The line that Triton's compiler refused: it counts from the `def` of the kernel, and names no file."""
    source, line = getattr(cause, "src", None), getattr(getattr(cause, "node", None), "lineno", None)
    found = re.match(r"def\s+(\w+)", source) if isinstance(source, str) else None
    if found is None or line is None:
        return None
    for file in sorted(home.rglob("*.py")):
        for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            if re.match(rf"\s*def\s+{found[1]}\s*\(", text):
                return Place(file, number + line - 1, found[1])
    return None
