"""Matrices: YAML files that describe sweeps, read with places, checked, and expanded into cases. Free of torch."""

from harness.matrix.axes import AXES, case_id
from harness.matrix.expand import Coverage, Expansion
from harness.matrix.expect import Expectation
from harness.matrix.expression import ExpressionError
from harness.matrix.loading import load
from harness.matrix.matrix import FAULTS, TIERS, Matrix
from harness.matrix.rows import SHARED_ROWS
from harness.matrix.source import MatrixError
from harness.matrix.where import Where

__all__ = [
    "AXES",
    "FAULTS",
    "SHARED_ROWS",
    "TIERS",
    "Coverage",
    "Expansion",
    "Expectation",
    "ExpressionError",
    "Matrix",
    "MatrixError",
    "Where",
    "case_id",
    "load",
]
