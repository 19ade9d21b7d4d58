"""The float64 reference against its own memory bound."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from references.attention import AttentionReference, attend
from tests.references.test_attention import ROUNDINGS, make_inputs


class LiveBytes(TorchDispatchMode):
    """Counts bytes of storages created while it is active: the largest and the peak of those alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in (
            [result] if isinstance(result, torch.Tensor) else result if isinstance(result, tuple | list) else []
        ):
            storage = tensor.untyped_storage()
            if isinstance(tensor, torch.Tensor) and id(storage) not in self.alive:
                self.alive[id(storage)] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, id(storage), None)
                self.largest = max(self.largest, storage.nbytes())
                self.peak = max(self.peak, sum(self.alive.values()))
        return result


def bytes_of(reference: AttentionReference) -> int:
    return sum(x.nbytes for x in vars(reference).values() if isinstance(x, torch.Tensor))


@pytest.mark.parametrize(
    "feature", [{}, {"causal": False, "sliding_window": 50}, {"alibi": True, "sinks": True}], ids=str
)
@pytest.mark.parametrize("max_elements", [1 << 13, 1 << 16])
def test_memory_stays_within_the_stated_bound(feature: dict[str, Any], max_elements: int) -> None:
    inputs = make_inputs((400, 1), (500, 300), kv_heads=4, group=2, size=4, size_v=4, **dict(feature))
    scores = 400 * 500 * 8
    sequence = 8 * 500 * 4 * (4 + 3 * 4) + 8 * 500 * 4 * 8  # k, v, |v|, v^2 and one copy while they are made
    with LiveBytes() as used:
        result = attend(inputs, ROUNDINGS["fp16"], max_elements=max_elements)
    assert used.peak - bytes_of(result) - sequence <= 32 * max_elements
    assert used.peak < scores * 8  # the scores as a whole would not fit
    with LiveBytes() as at_once:
        attend(inputs, ROUNDINGS["fp16"], max_elements=scores)
    assert at_once.largest > 8 * scores // 3  # the meter sees tiles that large


def test_sequences_computed_together_stay_within_the_bound_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("references.batches.LARGEST_ON_CPU", 1 << 25)
    inputs = make_inputs((2,) * 40, (60,) * 40, kv_heads=4, group=2, size=4, size_v=4)
    max_elements = 1 << 14
    peaks = {}
    for limit in (max_elements, 1 << 20):
        with LiveBytes() as used:
            result = attend(inputs, ROUNDINGS["fp16"], max_elements=limit)
        peaks[limit] = used.peak - bytes_of(result)
    bound = 32 * max_elements + 8 * (2 + 4) * max_elements
    assert peaks[max_elements] <= bound < peaks[1 << 20]
