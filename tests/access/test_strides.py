"""A kernel that ignores the strides of a cache is told as that, and only where nothing else is wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from harness.run.outcome import Outcome
from tests.access.faulty import again, case, faulty, run, told

UNIFIED = case("unified_paged", (5, 1), (30, 40))
K_STRIDES = "key_strides(args.k_cache, args.layout)"
V_STRIDES = "value_strides(args.v_cache, args.layout)"


@pytest.mark.parametrize("layout", ["linear_nhd", "hnd", "vllm_classic", "vectorized"])
def test_a_cache_that_is_read_as_if_it_had_no_gaps_is_named(layout: str, tmp_path: Path) -> None:
    strided = replace(UNIFIED, layout=layout, strides="cache")
    of_k, both = (
        faulty("unified_paged", tmp_path / name, K_STRIDES, K_STRIDES.replace("k_cache", "k_cache.contiguous()"))
        for name in ("k", "both")
    )
    verdict = run(of_k, strided)
    assert verdict.reason.startswith("read as if contiguous: K, whose strides are others; "), verdict.reason
    assert len(told(verdict)) == 2
    assert told(verdict)[1].startswith("by program (0, 0, 0) of unified_paged_kernel, storing tokens 0..4, ")
    assert run(of_k, replace(strided, strides="compact")).outcome is Outcome.PASS
    both = again(both, V_STRIDES, V_STRIDES.replace("v_cache", "v_cache.contiguous()"))
    assert told(run(both, strided))[0] == "read as if contiguous: K and V, whose strides are others"


def test_what_more_is_wrong_than_strides_is_not_taken_for_them_alone(tmp_path: Path) -> None:
    contract = faulty("unified_paged", tmp_path, K_STRIDES, K_STRIDES.replace("k_cache", "k_cache.contiguous()"))
    contract = again(contract, "cached = key < seq_len\n", "cached = key < seq_len - 1\n")
    lines = told(run(contract, replace(UNIFIED, strides="cache")))
    assert lines
    assert not any(line.startswith("read as if contiguous") for line in lines)
