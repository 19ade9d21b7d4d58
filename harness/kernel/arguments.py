"""LaunchArguments: everything a kernel adapter is handed, under the field's standard names.

Invariant: an adapter reads these and writes only `out`, `lse`, what `workspace` gives it and buffers of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from harness.kernel.workspace import Allocator


@dataclass(frozen=True)
class LaunchArguments:
    """Tensors live on one device; index tensors are int32; scales are 1-element float32 device tensors."""

    q: torch.Tensor  # [num_tokens, num_q_heads, head_size]
    k: torch.Tensor | None  # [num_tokens, num_kv_heads, head_size] new tokens; None where the contract takes none
    v: torch.Tensor | None  # [num_tokens, num_kv_heads, head_size_v]; rows of decode sequences are poison (by_phase)
    k_cache: (
        torch.Tensor
    )  # linear_nhd [pages, page_size, kv_heads, d]; vllm_classic [pages, kv_heads, d/x, page_size, x]
    v_cache: torch.Tensor  # linear_nhd [pages, page_size, kv_heads, dv]; vllm_classic [pages, kv_heads, dv, page_size]
    layout: str
    block_table: torch.Tensor  # [num_seqs, max_pages] int32
    query_start_loc: torch.Tensor  # [num_seqs + 1] int32
    seq_lens: torch.Tensor  # [num_seqs] int32
    max_query_len: int
    max_seq_len: int
    k_scale: torch.Tensor  # [1] float32; NaN where kv_block_descale is given
    v_scale: torch.Tensor  # [1] float32
    kv_dtype: str  # auto | fp8_e4m3 | fp8_e5m2
    softmax_scale: float
    causal: bool
    sliding_window: int  # 0: off; W: a query sees W keys, itself included
    logits_soft_cap: float  # 0: off; cap * tanh(s / cap), after the scale and before bias and mask
    alibi_slopes: torch.Tensor | None  # [num_q_heads] float32; bias = slope * (key position - query position)
    sinks: torch.Tensor | None  # [num_q_heads] float32; one more logit in the denominator, already scaled
    num_splits: int  # 0: the path without split-KV
    out: torch.Tensor  # [num_tokens, num_q_heads, head_size_v]
    lse: (
        torch.Tensor | None
    )  # [num_tokens, num_q_heads] float32, natural log, sinks included; -inf where no key is seen
    kv_block_descale: torch.Tensor | None = None  # [pages, kv_heads, 2] float32, of K then V; NaN for unused pages
    allocator: Allocator | None = None  # of `workspace`; None: memory that nobody looks at afterwards

    def workspace(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Scratch memory for this launch: `dtype` [*shape] of 0xFF bytes, NaN in every float type, on the device of q.

        The last dimension has stride 1, the others any: rows may lie far apart.
        """
        if self.allocator is not None:
            return self.allocator(name, shape, dtype)
        from harness.kernel.workspace import plain_workspace  # needs torch, which collecting does without

        return plain_workspace(shape, dtype, self.q.device)
