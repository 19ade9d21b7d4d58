from __future__ import annotations

import shlex

from hypothesis import given
from hypothesis import strategies as st

from harness.triage.reproduce import reproduce_line


def test_defaults_are_left_out() -> None:
    assert reproduce_line("cases/a.yaml", "a-gqa1", "smoke", {"data": 0, "geometry": 0}, {"plant": None, "x": []}) == (
        "pytest 'cases/a.yaml::a-gqa1'"
    )


def test_everything_else_is_named() -> None:
    line = reproduce_line(
        "cases/contexted_kv.yaml",
        "contexted_kv-gqa1",
        "nightly",
        {"data": 17, "geometry": 3},
        {"plant": ["a", "b c"], "keep_going": True, "--device": "cuda:1", "strict": False, "offset": -1},
    )
    assert line == (
        "pytest 'cases/contexted_kv.yaml::contexted_kv-gqa1' --tier nightly --data-seed 17 --geometry-seed 3"
        " --plant a --plant 'b c' --keep-going --device cuda:1 --offset=-1"
    )


def test_a_seed_of_zero_is_named_where_zero_is_not_the_default() -> None:
    assert reproduce_line("a.yaml", "x", seeds={"data": 0}, default_seeds={"data": 5}).endswith("--data-seed 0")


@given(path=st.text(min_size=1), case_id=st.text(min_size=1), value=st.text(min_size=1))
def test_a_shell_reads_back_what_was_meant(path: str, case_id: str, value: str) -> None:
    words = shlex.split(reproduce_line(path, case_id, options={"plant": value}))
    assert words[:2] == ["pytest", f"{path}::{case_id}"]
    assert words[2:] in (["--plant", value], [f"--plant={value}"])
