from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.case import Case, Rows
from harness.run.outcome import Outcome, Verdict
from harness.store.environment import environment
from harness.store.plain import as_float, plain, plain_dict
from harness.store.record import FORMAT_VERSION, Header, MalformedRecord, Record

numbers = st.floats(allow_nan=False)  # infinities included; NaN has a test of its own, as it does not equal itself
finite = st.floats(allow_nan=False, allow_infinity=False)
data = st.recursive(
    st.none() | st.booleans() | st.integers() | finite | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
records = st.builds(
    Record,
    id=st.text(),
    matrix=st.text(),
    matrix_path=st.text(),
    line=st.integers(min_value=1),
    tier=st.text(),
    kernel=st.text(),
    outcome=st.sampled_from(Outcome),
    reason=st.text(),
    ran=st.lists(st.text(), max_size=3).map(tuple),
    err_over_tol=st.none() | numbers,
    lse_err_over_tol=st.none() | numbers,
    tighter_err_over_tol=st.none() | numbers,
    seeds=st.dictionaries(st.text(), st.integers(), max_size=2),
    seconds=st.dictionaries(st.text(), numbers, max_size=3),
    reproduce=st.text(),
    explanation=st.none() | st.dictionaries(st.text(), data, max_size=3),
    worker=st.text(),
    case=st.dictionaries(st.text(), data, max_size=3),
    access=st.text(),
    branch=st.text(),
)
headers = st.builds(
    Header,
    run=st.text(),
    started=st.text(),
    argv=st.lists(st.text(), max_size=3).map(tuple),
    environment=st.dictionaries(st.text(), data, max_size=3),
    seeds=st.dictionaries(st.text(), st.integers(), max_size=2),
    plants=st.lists(st.text(), max_size=2).map(tuple),
    options=st.dictionaries(st.text(), data, max_size=3),
)


@given(records)
def test_a_record_comes_back_equal_from_one_ascii_line(record: Record) -> None:
    text = record.to_json()
    assert "\n" not in text
    assert text.isascii()
    assert Record.from_json(text) == record


@given(headers)
def test_a_header_comes_back_equal(header: Header) -> None:
    assert Header.from_json(header.to_json()) == header


def example(**changes: object) -> Record:
    values = {"id": "a", "matrix": "m", "matrix_path": "cases/m.yaml", "line": 7, "tier": "smoke", "kernel": "k"}
    return Record(**({**values, "outcome": Outcome.FAIL, "reason": "wrong"} | changes))


def test_numbers_that_are_not_finite_are_strict_json() -> None:
    record = example(
        err_over_tol=math.inf,
        lse_err_over_tol=math.nan,
        explanation={"worst": {"got": -math.inf}},
        seconds={"launch": math.inf},
    )
    values = json.loads(record.to_json(), parse_constant=lambda name: pytest.fail(f"{name} in the log"))
    assert values["err_over_tol"] == "inf"
    assert values["lse_err_over_tol"] == "nan"
    assert values["explanation"] == {"worst": {"got": "-inf"}}
    back = Record.from_json(record.to_json())
    assert back.err_over_tol == math.inf
    assert back.lse_err_over_tol is not None
    assert math.isnan(back.lse_err_over_tol)
    assert back.seconds == {"launch": math.inf}


def changed(**changes: object) -> str:
    return json.dumps({**json.loads(example().to_json()), **changes})


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "not JSON"),
        ("[1]", "not a record"),
        ('{"kind": "header"}', "not a record"),
        ('{"kind": "record", "id": "a"}', "record without access, branch, case, err_over_tol, explanation"),
        (changed(colour="red"), "record with unknown colour"),
        (changed(outcome="MAYBE"), "record 'a': 'MAYBE' is not a valid Outcome"),
        (changed(err_over_tol="big"), "record 'a': expected a number, got 'big'"),
        (changed(seconds=None), "record 'a'"),
        (example().to_json().replace('"line": 7', '"line": NaN'), "NaN is not strict JSON"),
    ],
)
def test_anything_else_is_refused_with_a_reason(text: str, complaint: str) -> None:
    with pytest.raises(MalformedRecord) as caught:
        Record.from_json(text)
    assert complaint in str(caught.value)


def test_a_header_of_another_format_says_so_before_anything_else() -> None:
    text = json.dumps({"kind": "header", "format": FORMAT_VERSION + 1, "new": 1})
    with pytest.raises(MalformedRecord, match=f"run log of format {FORMAT_VERSION + 1}; this attnreg reads format"):
        Header.from_json(text)


def test_a_record_of_a_verdict_holds_the_case_and_its_seeds() -> None:
    case = Case("m", "k", Rows("r", (1, 4), (9, -2)), data_seed=5)
    verdict = Verdict(
        Outcome.FAIL,
        "wrong",
        ("k1",),
        math.inf,
        seconds={"launch": 0.5},
        seeds={"data": 17},
        explanation={"rows": {"a": ("b",)}},
    )
    record = Record.of(case, verdict, id="m-r", matrix_path="cases/m.yaml", line=3, tier="ci", reproduce="pytest x")
    assert record.seeds == {"geometry": 0, "data": 17}
    assert record.case["rows"] == {"name": "r", "query_lens": [1, 4], "context_lens": [9, -2]}
    assert record.explanation == {"rows": {"a": ["b"]}}
    assert Record.from_json(record.to_json()) == record


def test_plain_refuses_what_is_not_data() -> None:
    assert plain({"a": {3, 1}, "b": (Outcome.PASS, math.nan)}) == {"a": [1, 3], "b": ["PASS", "nan"]}
    with pytest.raises(TypeError, match="object is not plain data"):
        plain([object()])
    with pytest.raises(TypeError, match="keys of plain data are strings, got 1"):
        plain_dict({1: 2})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="expected a number, got True"):
        as_float(True)


def test_the_environment_names_versions_and_commit() -> None:
    facts = environment()
    assert facts.keys() == {"python", "torch", "triton", "platform", "device", "driver", "cpu_count", "commit"}
    assert facts["python"]
    assert facts["torch"]
    assert plain_dict(facts) == facts
