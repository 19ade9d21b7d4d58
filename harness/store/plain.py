"""Plain data: dicts with string keys, lists, strings, bools, ints and finite floats; strict JSON by construction.

Invariant: a non-finite float becomes one of the strings "nan", "inf", "-inf", so every line of a run log is JSON that
any reader accepts, and `as_float` turns such a string back into the number.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence, Set
from enum import Enum
from typing import Any

NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def plain(value: object) -> object:
    """`value` as plain data. Sets are sorted, enums give their value; TypeError for anything else that is not data."""
    if isinstance(value, Enum):
        return plain(value.value)
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return plain_dict(value)
    if isinstance(value, Set):
        return [plain(item) for item in sorted(value)]
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [plain(item) for item in value]
    raise TypeError(f"{type(value).__name__} is not plain data: {value!r}")


def plain_dict(value: Mapping[str, object]) -> dict[str, Any]:
    """`value` as a dict of plain data; TypeError where a key is not a string."""
    return {_key(key): plain(item) for key, item in value.items()}


def as_float(value: object) -> float:
    """The number that `plain` wrote; ValueError where `value` is not one."""
    if isinstance(value, str) and value in NON_FINITE:
        return NON_FINITE[value]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    raise ValueError(f"expected a number, got {value!r}")


def dump_line(value: object) -> str:
    """`value` as one line of ASCII JSON without a line break."""
    return json.dumps(plain(value), allow_nan=False, ensure_ascii=True, separators=(", ", ": "))


def _key(key: object) -> str:
    if not isinstance(key, str):
        raise TypeError(f"keys of plain data are strings, got {key!r}")
    return key
