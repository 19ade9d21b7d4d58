"""Kernels of these tests are interpreted, so Triton must be told before any of them is imported."""

from __future__ import annotations

from harness.interpreter import prepare

prepare("cpu")
