"""Kernels that get stored bytes or their descales wrong fail, and the report names what they got wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from harness.case import Case
from harness.interpreter import prepare
from harness.run.outcome import Outcome, Verdict
from tests.access.faulty import KERNELS, case, faulty, run

prepare("cpu")

UNIFIED = case("unified_paged", (5, 1, 7, 1), (40, 60, -3, 100), head_size=24)
K_LOAD = "(payload_values(k, CACHE_MANTISSA) * k_scale)"
V_LOAD = "(payload_values(v, CACHE_MANTISSA) * v_scale)"
BIAS = "bias: tl.constexpr = 1 << (6 - MANTISSA)\n        power"
BY_TENSOR, BY_HEAD, BY_PAGE, BY_TOKEN = ({"descales_per": per} for per in ("tensor", "head", "page", "token"))
SHARED = "../_shared/payload.py"

# name: (axes, what of the source becomes what, in which file, what the row "explained by" begins with)
FAULTS: dict[str, tuple[dict[str, str], str, str, str, str]] = {
    "K descale dropped": (BY_TENSOR, K_LOAD, "payload_values(k, CACHE_MANTISSA)", "", "a descale not applied (of K)"),
    "V descale dropped": (BY_TOKEN, V_LOAD, "payload_values(v, CACHE_MANTISSA)", "", "a descale not applied (of V)"),
    "another head's K descale": (
        BY_HEAD,
        "tl.load(k_descale_ptr + kv_head * k_descale_head)",
        "tl.load(k_descale_ptr + (kv_head ^ 1) * k_descale_head)",
        "",
        "the descale of another KV head (of K)",
    ),
    "another head's V descale of its page": (
        BY_PAGE,
        "v_descale_slot + kv_head * v_descale_head",
        "v_descale_slot + (kv_head ^ 1) * v_descale_head",
        "",
        "the descale of another KV head (of V)",
    ),
    "K descale of the slot before": (
        {**BY_TOKEN, "page_size": "544"},
        "slot * k_descale_slot",
        "tl.maximum(slot - 1, 0) * k_descale_slot",
        "",
        "the descale of the neighbouring token (of K)",
    ),
    "fnuz taken for fn": (
        {"kv_dtype": "fp8_e4m3fnuz"},
        BIAS,
        BIAS.replace("1 << (6 - MANTISSA)", "(1 << (6 - MANTISSA)) - 1"),
        SHARED,
        "stored bytes read as another format (K and V, the exponent off by one)",
    ),
    "e5m2 taken for e4m3": (
        {"kv_dtype": "fp8_e5m2fnuz"},
        "_FNUZ_MANTISSA = {torch.float8_e4m3fnuz: 3, torch.float8_e5m2fnuz: 2}",
        "_FNUZ_MANTISSA = {torch.float8_e4m3fnuz: 3, torch.float8_e5m2fnuz: 3}",
        SHARED,
        "stored bytes read as another format (K and V, e5m2 for e4m3 or back)",
    ),
    "the sign of int8 lost": (
        {"kv_dtype": "int8"},
        "value = payload.to(tl.float32)",
        "value = payload.to(tl.uint8, bitcast=True).to(tl.float32)",
        SHARED,
        "stored bytes read as another format (K and V, the sign lost)",
    ),
    "q descale dropped": (
        {"q_dtype": "fp8_e4m3"},
        "softmax_scale *= tl.load(q_descale_ptr)",
        "tl.load(q_descale_ptr)",
        "",
        "the descale of the query not applied",
    ),
    "output scale dropped": (
        {"out_dtype": "fp8_e4m3", "data": "biased"},
        "out = out / tl.load(output_scale_ptr)",
        "tl.load(output_scale_ptr)",
        "../_shared/softmax_rows.py",
        "the scale of the output not applied",
    ),
}


def quantised(axes: dict[str, str]) -> Case:
    sizes = {name: int(value) if value.isdecimal() else value for name, value in axes.items()}
    return replace(UNIFIED, **{"kv_dtype": "fp8_e4m3", "strides": "cache", **sizes})


def explained_by(verdict: Verdict) -> str:
    assert verdict.explanation is not None
    return "; ".join(verdict.explanation["rows"].get("explained by", []))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_fails_and_is_named(fault: str, tmp_path: Path) -> None:
    axes, old, new, file, said = FAULTS[fault]
    honest = run(KERNELS["unified_paged"], quantised(axes))
    assert honest.outcome is Outcome.PASS, honest.reason
    verdict = run(faulty("unified_paged", tmp_path, old, new, file), quantised(axes))
    assert verdict.outcome is Outcome.FAIL
    assert explained_by(verdict).startswith(said)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("cached = key < seq_len\n", "cached = key < seq_len - 1\n"),
        ("page[None, :], slot[None, :], kv_head, dim", "page[None, :], slot[None, :], kv_head ^ 1, dim"),
        ("visible(query_pos[:, None], key", "visible(query_pos[:, None] - 1, key"),
    ],
)
def test_other_faults_get_no_such_name(old: str, new: str, tmp_path: Path) -> None:
    for number, axes in enumerate((BY_TENSOR, BY_PAGE, BY_TOKEN)):
        verdict = run(faulty("unified_paged", tmp_path / str(number), old, new), quantised(axes))
        assert verdict.outcome is Outcome.FAIL
        assert explained_by(verdict) == ""
