import itertools

import pytest
import torch

from harness.problem.masks import alibi_slopes, visible, visible_range


@pytest.mark.parametrize(
    ("causal", "window", "seq_len", "sink_tokens"),
    [*itertools.product([True, False], [None, 1, 3, 50], [0, 1, 7], [0, 1, 2, 9])],
)
def test_visible_keys_are_those_of_the_definition(
    causal: bool, window: int | None, seq_len: int, sink_tokens: int
) -> None:
    query = torch.arange(-3, 9)
    key = torch.arange(-2, 12)
    got = visible(query[:, None], key, seq_len, causal, window, sink_tokens)
    first, end, sinks = visible_range(query, seq_len, causal, window, sink_tokens)
    assert bool((sinks <= first).all())
    assert bool((end > first)[(sinks > 0) & (query < seq_len)].all())
    for i, q in enumerate(query.tolist()):
        for j, k in enumerate(key.tolist()):
            near = window is None or q - k < window or k < sink_tokens
            seen = 0 <= k < seq_len and (not causal or k <= q) and near
            assert bool(got[i, j]) == seen, (q, k)


def test_range_is_empty_where_nothing_is_seen() -> None:
    seen = visible_range(torch.tensor([-1, 0]), 5, True, None, 4)
    assert (seen.end > seen.first).tolist() == [False, True]


def test_alibi_slopes_of_the_paper() -> None:
    assert alibi_slopes(8) == tuple(2.0**-i for i in range(1, 9))
    assert alibi_slopes(12) == (*alibi_slopes(8), 2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5)
    assert all(len(alibi_slopes(n)) == len(set(alibi_slopes(n))) == n for n in range(1, 70))
