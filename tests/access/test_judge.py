"""Which program stored what, and findings that are told once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from harness.access.judge import stored_parts
from harness.access.similar import similar
from harness.oracle.findings import AccessFinding

ONE = AccessFinding("never_read", ("k_cache",), 0, 0, 5, 5, 1, 3, 5, (0, 0), "kernel", (0, 0, 0), "a.py:1")


def test_rows_and_dims_by_program() -> None:
    writers = np.zeros((3, 2, 4), dtype=np.int32)
    writers[0] = 7
    writers[2, 1] = 4
    by_row = {
        part.program: (part.tokens.tolist(), part.heads.tolist(), part.dims.all()) for part in stored_parts(writers)
    }
    assert by_row == {7: ([0, 0], [0, 1], True), 4: ([2], [1], True)}
    writers[2, 1, 2:] = 5
    halves = {part.program: (part.tokens.tolist(), part.dims.tolist()) for part in stored_parts(writers)}
    assert halves[4] == ([2], [True, True, False, False])
    assert halves[5] == ([2], [False, False, True, True])


def test_findings_that_say_the_same_are_told_once_and_counted() -> None:
    further = replace(ONE, sequence=1, program=(1, 0, 0))
    values = [replace(one, buffers=("v_cache",), where="a.py:2") for one in (ONE, further)]
    assert similar([ONE, further, *values]) == (replace(ONE, buffers=("k_cache", "v_cache"), others=1),)
    assert similar([ONE, values[0], values[1]]) == (ONE, replace(values[0], others=1))
    assert similar([ONE, replace(ONE, kind="behind_end")]) == (ONE, replace(ONE, kind="behind_end"))
    assert similar([]) == ()
