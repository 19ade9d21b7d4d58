"""Which rows tier 2 looks at, and which of them together.

Invariant: follows from lengths and shapes alone; memory is bounded by what is looked at together, never by the case.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from harness.oracle.row_noise import MOST_WEIGHTS, by_gram
from references.attention import AttentionInputs

MAX_ROWS = 64  # sampled per sequence
MAX_HEAD_ROWS = 256  # sampled rows times gqa_ratio
MAX_WORK, FEWEST_ROWS = 1 << 28, 8  # query heads x keys x dims of the rows of a sequence, unless so few need more
PADDING = {"cpu": 1 << 18, "cuda": 1 << 24}  # elements up to which a batch may be padding; beyond, half of it
ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 26}  # of the largest float32 temporary, where one row needs no more
PASSES = 16  # float64 temporaries of the scores of a row that count as one float32 temporary would


def sampled(query_len: int, group: int, most: int = MAX_ROWS) -> tuple[int, ...]:
    """Rows to look at: the first, the last and evenly spread ones between, at most `most`."""
    count = min(query_len, most, MAX_ROWS, max(MAX_HEAD_ROWS // group, 4))
    return tuple(sorted({round(i * (query_len - 1) / max(count - 1, 1)) for i in range(count)}))


@dataclass(frozen=True)
class Part:
    """Sampled rows of one sequence that are looked at together; `whole` if they are all of them."""

    sequence: int
    rows: tuple[int, ...]
    seq_len: int
    whole: bool


def batches(inputs: AttentionInputs, page_size: int) -> Iterator[list[Part]]:
    """Parts in lists that are computed together, padded, largest first; a large sequence is cut by rows.

    No float32 temporary of a batch has more than ELEMENTS elements, unless a single row of one sequence does.
    """
    heads = inputs.q.shape[1]
    group, size, device = heads // inputs.k.shape[1], inputs.v.shape[2], inputs.q.device.type

    def elements(num_rows: int, seq_len: int) -> int:
        signatures = 2 * (-(-seq_len // page_size) + 1)
        per_key = PASSES if by_gram(signatures, MOST_WEIGHTS, size) else max(signatures, PASSES)
        return num_rows * heads * max(signatures * size, seq_len * per_key)

    limit, padding = ELEMENTS[device], PADDING[device]
    parts = []
    for sequence, seq_len in enumerate(inputs.seq_lens):
        affordable = max(MAX_WORK // (heads * size * max(seq_len, 1)), FEWEST_ROWS)
        rows = sampled(inputs.query_lens[sequence], group, affordable)
        if seq_len > 0 and rows:
            step = max(limit // elements(1, seq_len), 1)
            parts += [
                Part(sequence, rows[start : start + step], seq_len, step >= len(rows))
                for start in range(0, len(rows), step)
            ]
    parts.sort(key=lambda part: (-part.seq_len, -len(part.rows), part.sequence))
    batch: list[Part] = []
    own = most_rows = 0
    for part in parts:
        most_rows, own = max(most_rows, len(part.rows)), own + elements(len(part.rows), part.seq_len)
        padded = (len(batch) + 1) * elements(most_rows, batch[0].seq_len if batch else part.seq_len)
        if batch and (padded > limit or padded > max(padding, 2 * own)):
            yield batch
            batch, most_rows, own = [], len(part.rows), elements(len(part.rows), part.seq_len)
        batch.append(part)
    if batch:
        yield batch
