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
    """Tensors live on one device; index tensors are int32; descales and scales are float32 device tensors.

    A value is its payload times its descale. At most one kind of cache descale is given: per tensor or per KV head in
    `k_scale` and `v_scale`, per page in `kv_block_descale`, per token in `k_token_descale` and `v_token_descale`.
    """

    q: torch.Tensor  # [num_tokens, num_q_heads, head_size] in `dtype`, or 8-bit with a `q_descale`
    k: torch.Tensor | None  # [num_tokens, num_kv_heads, head_size] new tokens; None where the contract takes none
    v: torch.Tensor | None  # [num_tokens, num_kv_heads, head_size_v]; rows of decode sequences are poison (by_phase)
    k_cache: torch.Tensor  # in the dimensions that harness.layout names for `layout`, e.g. [pages, page_size, heads, d]
    v_cache: torch.Tensor
    layout: str
    block_table: torch.Tensor | None  # [num_seqs, max_pages] int32; None where kv_page_indices is given
    query_start_loc: torch.Tensor  # [num_seqs + 1] int32
    seq_lens: torch.Tensor  # [num_seqs] int32
    max_query_len: int
    max_seq_len: int
    k_scale: torch.Tensor  # [1], or [num_kv_heads] of any stride; [1] NaN where descales come by page or token
    v_scale: torch.Tensor
    kv_dtype: str  # auto | fp8_e4m3 | fp8_e4m3fnuz | fp8_e5m2 | fp8_e5m2fnuz | int8
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
    kv_indptr: torch.Tensor | None = None  # [num_seqs + 1] int32: where the pages of each sequence begin, in pages
    kv_page_indices: torch.Tensor | None = None  # [total pages, then padding] int32
    kv_last_page_len: torch.Tensor | None = None  # [num_seqs] int32: tokens in the last page; 0 for no page
    k_token_descale: torch.Tensor | None = None  # [pages, page_size, kv_heads] float32; NaN for slots without a token
    v_token_descale: torch.Tensor | None = None
    q_descale: torch.Tensor | None = None  # [1] float32; None where q is stored in `dtype`
    output_scale: torch.Tensor | None = None  # [1] float32: out = value / output_scale; None where out has `dtype`
    sink_tokens: int = 0  # so many leading tokens of a sequence are seen although the window has left them behind
    dtype: torch.dtype | None = None  # of what is not stored in 8 bits; None: that of q
    allocator: Allocator | None = None  # of `workspace`; None: memory that nobody looks at afterwards

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype that payloads are values of: that of q, unless q is stored in 8 bits."""
        return self.q.dtype if self.dtype is None else self.dtype

    def workspace(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Scratch memory for this launch: `dtype` [*shape] of 0xFF bytes, NaN in every float type, on the device of q.

        The last dimension has stride 1, the others any: rows may lie far apart. Raises ValueError for negative sizes
        and elements of other than 1, 2, 4 or 8 bytes.
        """
        if dtype.itemsize not in (1, 2, 4, 8):
            raise ValueError(f"workspace '{name}': elements have 1, 2, 4 or 8 bytes, not {dtype.itemsize} ({dtype})")
        if any(size < 0 for size in shape):
            raise ValueError(f"workspace '{name}': sizes must not be negative: {tuple(shape)}")
        if self.allocator is not None:
            return self.allocator(name, shape, dtype)
        from harness.kernel.workspace import plain_workspace  # needs torch, which collecting does without

        return plain_workspace(shape, dtype, self.q.device)
