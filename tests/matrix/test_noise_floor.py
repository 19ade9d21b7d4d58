"""The key noise_floor of a matrix: read, off unless given, mistakes told with their place."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.matrix import MatrixError, load
from harness.matrix.schema import build
from tests.matrix.test_malformed import BASE, KERNELS


@pytest.mark.parametrize(
    ("line", "found"), [("", "off"), ("noise_floor: report\n", "report"), ("noise_floor: fail\n", "fail")]
)
def test_it_is_read(tmp_path: Path, line: str, found: str) -> None:
    path = tmp_path / "demo.yaml"
    path.write_text(line + BASE)
    assert load(path, kernel_names=KERNELS).noise_floor == found


def test_a_mistake_is_told_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "demo.yaml"
    path.write_text("noise_floor: fial\n" + BASE)
    with pytest.raises(MatrixError) as error:
        load(path, kernel_names=KERNELS)
    assert "1:14: unknown noise_floor 'fial'. Did you mean 'fail'?" in str(error.value)


def test_the_schema_knows_it() -> None:
    assert build()["properties"]["noise_floor"]["enum"] == ["report", "fail"]
