"""The key twins of a matrix: read, none unless given, mistakes told with their place."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.matrix import MatrixError, load
from harness.matrix.axes import TWIN_AXES
from harness.matrix.schema import build
from tests.matrix.test_malformed import BASE, KERNELS


@pytest.mark.parametrize(("line", "found"), [("", ()), ("twins: [strides, layout]\n", ("strides", "layout"))])
def test_they_are_read(tmp_path: Path, line: str, found: tuple[str, ...]) -> None:
    path = tmp_path / "demo.yaml"
    path.write_text(line + BASE)
    assert load(path, kernel_names=KERNELS).twins == found


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("twins: [layuot]\n", "1:9: unknown axis of twins 'layuot'. Did you mean 'layout'?"),
        ("twins: [layout, dtype]\n", "1:17: unknown axis of twins 'dtype'"),
        ("twins: layout\n", "1:8: twins is a list, not 'layout'. Write [layout]"),
        ("twins: [layout, layout]\n", "1:17: twins lists layout twice"),
    ],
)
def test_a_mistake_is_told_with_its_place(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "demo.yaml"
    path.write_text(line + BASE)
    with pytest.raises(MatrixError) as error:
        load(path, kernel_names=KERNELS)
    assert said in str(error.value)


def test_the_schema_knows_them() -> None:
    assert build()["properties"]["twins"]["items"]["enum"] == list(TWIN_AXES)
