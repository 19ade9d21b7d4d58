"""An exchange of descales in words: only keys and transitions of the cache are named."""

from __future__ import annotations

import pytest

from harness.case import Case, Rows
from harness.oracle.stale import NEIGHBOUR, Stale
from harness.triage.stale import tell_stale

PAGES = ((5, 1, 8),)  # of 80 keys; the last page holds new tokens only, which have no descale
CASE = Case("m", "k", Rows("r", (20,), (60,)), kv_dtype="fp8_e4m3", descales_per="page", page_size=32)
FACTORS = {"K": (1.01, 1.01)}


@pytest.mark.parametrize(
    ("cached_len", "keys", "every"),
    [(60, "keys 32-59 ", False), (44, "keys 32-43 ", False), (64, "keys 32-63 ", False), (80, "keys 32-63 ", True)],
)
def test_keys_that_are_not_in_the_cache_are_not_named(cached_len: int, keys: str, every: bool) -> None:
    [told] = tell_stale(CASE, Stale("K", NEIGHBOUR, -1), PAGES, (cached_len,), FACTORS, 32)
    assert keys in told
    assert ("likewise at every page transition" in told) is every
