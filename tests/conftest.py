"""Tests run on the CPU, wherever they run: Triton kernels are interpreted in every test process.

Property tests draw the same examples everywhere and are not judged by the clock of a busy machine.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings

from harness.interpreter import prepare

prepare("cpu")

settings.register_profile(
    "attnreg", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)
settings.load_profile("attnreg")
