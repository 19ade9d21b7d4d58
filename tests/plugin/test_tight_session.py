"""A profile too loose to test anything fails a decisive run whose cases all pass, and is named."""

from __future__ import annotations

import pytest

from harness.run.outcome import Outcome
from tests.plugin.test_session import Toys, toys  # noqa: F401  a fixture

AXES = "page_size: [8, 16, 24, 32]"  # times two seeds: eight cases
CI_TOO = "  ci: full"


@pytest.mark.parametrize(
    ("kernel", "tier", "status"),
    [("toy_loose", "ci", 1), ("toy_loose", "smoke", 0), ("toy_honest", "ci", 0)],
)
def test_a_loose_profile_fails_decisive_tiers(toys: Toys, kernel: str, tier: str, status: int) -> None:  # noqa: F811
    result = toys.run(kernel, f"--tier={tier}", axes=AXES, expect=CI_TOO)
    assert result.ret == status
    assert toys.outcomes == {kernel: {Outcome.PASS}}
    if kernel == "toy_loose":
        result.stdout.fnmatch_lines(["*numerics*toy_loose fp32: too loose*"])
    else:
        result.stdout.no_fnmatch_line("*numerics*")
