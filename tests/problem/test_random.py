import pytest
import torch

from harness.problem import random

MASK = (1 << 64) - 1
PINNED_HASHES = [8316373774675837106, -3947275563459553859]
PINNED_NORMALS = [-1070473145, -1091971304, -1084477285, 1070830481]


def splitmix64(state: int) -> int:
    """The published finaliser, in plain integers."""
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def test_hash_is_splitmix64_over_a_counter() -> None:
    hashes = [h & MASK for h in random.hash64(5, "k", 0, 9, "cpu").tolist()]
    gamma = 0x9E3779B97F4A7C15
    key = _invert(hashes[0])
    assert hashes == [splitmix64((key + i * gamma) & MASK) for i in range(9)]


def _invert(h: int) -> int:
    """The state that splitmix64 maps to `h`."""
    h = h ^ (h >> 31) ^ (h >> 62)
    h = (h * pow(0x94D049BB133111EB, -1, 1 << 64)) & MASK
    h = h ^ (h >> 27) ^ (h >> 54)
    h = (h * pow(0xBF58476D1CE4E5B9, -1, 1 << 64)) & MASK
    return h ^ (h >> 30) ^ (h >> 60)


def test_bits_are_pinned() -> None:
    """Another machine, version or device must draw the same bits."""
    assert random.hash64(0, "q", 0, 2, "cpu").tolist() == PINNED_HASHES
    drawn = random.normal(0, "q", (4,), "cpu")
    assert drawn.view(torch.int32).tolist() == PINNED_NORMALS


def test_neither_chunks_nor_length_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = random.normal(1, "k", (1003,), "cpu")
    monkeypatch.setattr(random, "_CHUNK", 7)
    assert torch.equal(random.normal(1, "k", (1003,), "cpu"), whole)
    assert torch.equal(random.normal(1, "k", (17, 2), "cpu").flatten(), whole[:34])


@pytest.mark.parametrize("other", [(2, "k"), (1, "v"), (11, "k")])
def test_streams_and_seeds_are_independent(other: tuple[int, str]) -> None:
    a = random.normal(1, "k", (100_000,), "cpu")
    b = random.normal(*other, (100_000,), "cpu")
    assert torch.equal(a, random.normal(1, "k", (100_000,), "cpu"))
    assert abs(float((a * b).mean())) < 0.02


def test_normal_has_the_moments_and_the_tails_of_the_normal_distribution() -> None:
    x = random.normal(3, "k", (1_000_000,), "cpu").double()
    assert abs(float(x.mean())) < 5e-3
    assert abs(float(x.var()) - 1) < 1e-2
    assert abs(float((x**4).mean()) - 3) < 5e-2
    assert abs(float((x.abs() < 1).double().mean()) - 0.6827) < 3e-3
    assert 4.2 < float(x.abs().max()) < 4.33
    neighbours = x.view(-1, 4)  # the four numbers out of one hash
    assert float((neighbours.T @ neighbours / len(neighbours) - torch.eye(4)).abs().max()) < 1e-2


def test_uniform_and_integers_cover_their_range() -> None:
    u = random.uniform(0, "u", (100_000,), "cpu")
    assert 0 <= float(u.min()) < 1e-3
    assert 0.999 < float(u.max()) < 1
    counts = random.integers(0, "i", (70_000,), 7, "cpu").bincount(minlength=7)
    assert len(counts) == 7
    assert float((counts / 10_000 - 1).abs().max()) < 0.05


def test_permutation() -> None:
    drawn = random.permutation(4, "pages", 100)
    assert sorted(drawn) == list(range(100))
    assert drawn == random.permutation(4, "pages", 100)
    assert drawn != random.permutation(5, "pages", 100)
