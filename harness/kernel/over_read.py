"""A known over-read: what a kernel reads behind what it needs, declared so that it is provided, and nothing else is.

Invariant: declared memory is readable and holds dead content; a kernel whose result depends on it still fails.
"""

from __future__ import annotations

from dataclasses import dataclass

OVER_READABLE = {
    "block_table": "entries behind the last page of a row",
    "kv_page_indices": "entries behind the pages of a sequence",
    "k_cache": "slots behind the last cached token of a row",
    "v_cache": "slots behind the last cached token of a row",
}
BEHIND_THE_END = ("block_table", "kv_page_indices")  # it lies behind the last element, too; of the others in the pool
MAX_AMOUNT = 512  # as much as lies behind every strided view (harness.kernel.guarded.MARGIN)


@dataclass(frozen=True)
class OverRead:
    """The kernel may read up to `amount` (units: OVER_READABLE) of `buffer` too many, `because`."""

    buffer: str
    amount: int
    because: str

    def __post_init__(self) -> None:
        if self.buffer not in OVER_READABLE or not 1 <= self.amount <= MAX_AMOUNT or not self.because:
            known = ", ".join(OVER_READABLE)
            raise ValueError(
                f"an over-read needs a buffer ({known}), an amount in 1..{MAX_AMOUNT} and a reason: {self}"
            )
