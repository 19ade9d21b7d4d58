"""Writers in plain torch: a right one, and one for each fault of faults.py."""

from __future__ import annotations

from harness.kernel.writer import WriterContract

FAULTS = (
    "without_descale", "multiplied", "descales_exchanged", "toward_zero", "ties_away", "no_saturation", "twice_rounded",
    "next_slot", "token_skipped", "slots_exchanged", "padding_stored", "padding_to_slot_0", "head_skipped", "k_for_v",
    "page_cleaned", "gap_written", "input_written", "raising", "offsets_of_32_bits", "carry_lost",
    "descale_of_head_0", "descale_of_page_1",
)  # fmt: skip
KERNELS = tuple(
    WriterContract(
        name=name,
        about="in plain torch",
        entry=f"writers.py:{name}",
        descales_per=frozenset({"tensor", "page"}),
    )
    for name in ("torch_writer", *FAULTS)
)
