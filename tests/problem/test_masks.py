import itertools

import pytest
import torch

from harness.problem.masks import alibi_slopes, visible, visible_range


@pytest.mark.parametrize(
    ("causal", "window", "seq_len"), [*itertools.product([True, False], [None, 1, 3, 50], [0, 1, 7])]
)
def test_visible_keys_are_those_of_the_definition(causal: bool, window: int | None, seq_len: int) -> None:
    query = torch.arange(-3, 9)
    key = torch.arange(-2, 12)
    got = visible(query[:, None], key, seq_len, causal, window)
    for i, q in enumerate(query.tolist()):
        for j, k in enumerate(key.tolist()):
            seen = 0 <= k < seq_len and (not causal or k <= q) and (window is None or q - k < window)
            assert bool(got[i, j]) == seen, (q, k)


def test_range_is_empty_where_nothing_is_seen() -> None:
    first, end = visible_range(torch.tensor([-1, 0]), 5, True, None)
    assert (end > first).tolist() == [False, True]


def test_alibi_slopes_of_the_paper() -> None:
    assert alibi_slopes(8) == tuple(2.0**-i for i in range(1, 9))
    assert alibi_slopes(12) == (*alibi_slopes(8), 2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5)
    assert all(len(alibi_slopes(n)) == len(set(alibi_slopes(n))) == n for n in range(1, 70))
