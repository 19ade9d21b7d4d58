"""Numerics profile: the roundings a kernel declares, from which its tolerance follows.

Order-independent roundings (dequantised KV rounded to the query dtype) are emulated in the reference and cost no
tolerance; order-dependent ones (the cast of P, accumulators, split partials, the output cast) enter the tolerance.
A declaration is checked by the runs themselves: too tight a profile fails, too loose a one has no power.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NumericsProfile:
    """Fields name element types of harness.dtypes; "q" means the dtype of the query of the case at hand."""

    kv_dequant: str = "round_to_q"  # exact: payload * descale in float32 | round_to_q: then rounded to the query dtype
    p_dtype: str = "q"  # what softmax probabilities are rounded to before the product with V
    p_scale: float = 1.0  # factor applied to P before that rounding
    sum_after_cast: bool = False  # whether the row sum adds rounded probabilities
    out_dtype: str = "q"
    out_scale: float = 1.0
    split_partial_dtype: str = "fp32"  # what split-KV partial outputs are stored in
    mma: str = "wgmma"  # simt | mma_sync | wgmma: which units accumulate; matrix units truncate on some GPUs
    lse_base: str = "e"  # e | 2

    def p_type(self, q_dtype: str) -> str:
        return q_dtype if self.p_dtype == "q" else self.p_dtype

    def out_type(self, q_dtype: str) -> str:
        return q_dtype if self.out_dtype == "q" else self.out_dtype
