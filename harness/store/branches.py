"""Branches: how the cases of a run spread over the branches of each kernel's dispatch.

Invariant: a branch counts as reached only by a case that was launched. A run of everything is wrong where a branch was
neither reached nor explained; any run is, where one was both. Free of torch: it works on records.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from harness.store.record import Record


@dataclass(frozen=True)
class Reach:
    """Of one kernel. Branches are in the order of its dispatch."""

    kernel: str
    taken: Mapping[str, int]  # cases by branch, zero included
    words: Mapping[str, str]  # what each branch is taken for
    explained: Mapping[str, str]  # why a branch is left out
    complete: bool  # whether all cases of all matrices of the folder ran

    @property
    def unreached(self) -> tuple[str, ...]:
        """Branches that no case took, for no reason."""
        return tuple(b for b, count in self.taken.items() if not count and b not in self.explained)

    @property
    def contradicted(self) -> tuple[str, ...]:
        """Branches that are explained as left out, and were taken."""
        return tuple(b for b, count in self.taken.items() if count and b in self.explained)

    @property
    def wrong(self) -> bool:
        """Whether a run with this reach is no success."""
        return bool(self.contradicted or (self.complete and self.unreached))

    @property
    def text(self) -> str:
        """One sentence for summaries."""
        reached = sum(count > 0 for count in self.taken.values())
        parts = [f"{reached} of {len(self.taken)} branches reached{'' if self.complete else ' by what ran'}"]
        never = [f"{b} ({self.words[b]})" for b in self.unreached]
        never += [f"{b} (explained: {why})" for b, why in self.explained.items() if not self.taken[b]]
        parts += [f"never: {', '.join(never)}"] if never else []
        parts += [f"reached though said to be left out: {', '.join(self.contradicted)}"] if self.contradicted else []
        return "; ".join(parts)


def reach(
    records: Sequence[Record],
    branches: Mapping[str, Mapping[str, str]],
    explained: Iterable[tuple[str, str, str]],
    *,
    complete: bool,
) -> list[Reach]:
    """One entry per kernel of `branches` (words by branch, by kernel) of which some case took a branch.

    explained: kernel, branch and reason, as the matrices of the run state them.
    """
    taken: dict[str, Counter[str]] = {}
    for record in records:
        if record.branch and record.kernel in branches:
            taken.setdefault(record.kernel, Counter())[record.branch] += 1
    reasons: dict[str, dict[str, str]] = {}
    for kernel, branch, because in explained:
        reasons.setdefault(kernel, {})[branch] = because
    return [
        Reach(kernel, {b: counts[b] for b in branches[kernel]}, branches[kernel], reasons.get(kernel, {}), complete)
        for kernel, counts in sorted(taken.items())
    ]
