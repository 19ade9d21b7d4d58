"""Chosen rows with everything kept agree with the full reference, whatever the feature, order and padding."""

from __future__ import annotations

import pytest
import torch

from references.attention import Rounding, attend
from references.rows import attention_rows
from tests.oracle.cases import FEATURES, make_case


@pytest.mark.parametrize("feature", FEATURES)
def test_rows_agree_with_the_reference(feature: str) -> None:
    inputs = make_case("normal", "bf16", **dict(FEATURES[feature]))
    reference = attend(inputs, Rounding(2.0**-8))
    rows = attention_rows(inputs, [2, 0, 3, 1], [range(20), [0, 5, 47], [0, 1, 2], [0]])
    real = rows.real.repeat_interleave(rows.group, 1)[:, None, :, None]  # [num_seqs, 1, R * group, 1]
    assert ((rows.out - rows.pick(reference.out)) * real).abs().max() < 1e-12
    want = rows.pick(reference.lse[..., None])
    torch.testing.assert_close(rows.lse.masked_fill(~real, 0), want.masked_fill(~real, 0), rtol=0, atol=1e-12)
    assert not (rows.p * ~(rows.visible & real)).any()
