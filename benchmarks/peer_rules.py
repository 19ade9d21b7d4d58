"""The pass rules of public attention test suites, each a pure function of outputs: True where the suite would fail.

Invariant: a rule reads `Outputs` and nothing else. All are replayed against float64 over the stored bytes, which is
kinder to them than the references they really use (low precision, or from unquantised data).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from references.attention import AttentionInputs


@dataclass(frozen=True)
class Outputs:
    """One kernel's output beside what a suite compares it with; all [num_tokens, num_q_heads, head_size_v]."""

    out: torch.Tensor  # the kernel's, any float dtype
    want: torch.Tensor  # float64
    low: torch.Tensor  # float64: unfused attention in the kernel's dtypes, for rules relative to such an error
    fp8: bool  # whether the cache or P is 8 bit: suites loosen their rules there

    @property
    def error(self) -> torch.Tensor:
        """|out - want| float64; NaN stays NaN."""
        return (self.out.double() - self.want).abs()


def beyond(outputs: Outputs, atol: float, rtol: float) -> bool:
    """Any element with |out - want| > atol + rtol |want|, or NaN: what torch.testing.assert_close refuses."""
    return not bool((outputs.error <= atol + rtol * outputs.want.abs()).all())


def vllm_prefix(outputs: Outputs) -> bool:
    """vLLM, test_prefix_prefill.py: atol 1e-4 (1e-3 with an fp8 cache), rtol 0, on its own data: U(-1e-3, 1e-3)."""
    return beyond(outputs, 1e-3 if outputs.fp8 else 1e-4, 0.0)


def close_1e_2(outputs: Outputs) -> bool:
    """KernelBench, attention-gym, SGLang's sgl-kernel and vLLM's backend tests: atol = rtol = 1e-2."""
    return beyond(outputs, 1e-2, 1e-2)


def aiter_max_abs(outputs: Outputs) -> bool:
    """aiter, op_tests/test_batch_prefill.py, fp8: passes while the largest absolute error is below 0.055."""
    return not bool((outputs.error < 0.055).all())


def flash_attention_2x(outputs: Outputs) -> bool:
    """flash-attention, tests/test_flash_attn.py: max|out - ref| <= 2 max|pt - ref| + 2 max|ref + 0.3 - 0.3 - ref|.

    ref is float32 attention cast to the dtype of the output, pt unfused attention in that dtype; with an fp8 P its
    normalised P is cast to fp8, where most of it is flushed to zero at thousands of keys, and the rule allows anything.
    """
    dtype = outputs.out.dtype if outputs.out.itemsize == 2 else torch.bfloat16
    ref = outputs.want.to(dtype)
    grain = (ref + 0.3 - 0.3 - ref).abs().max().double()
    allowed = 2 * (outputs.low - ref.double()).abs().max() + 2 * grain
    return not bool(((outputs.out.double() - ref.double()).abs() <= allowed).all())


def flashinfer_bench(outputs: Outputs) -> bool:
    """FlashInfer-Bench, default evaluator: any element with an absolute and a relative error above 1e-2."""
    relative = outputs.error / outputs.want.abs().clamp_min(1e-8)
    return not bool(((outputs.error <= 1e-2) | (relative <= 1e-2)).all())


def cudnn_fp8(outputs: Outputs) -> bool:
    """cuDNN frontend, fp8 attention tests: atol 0.08, rtol 0.2."""
    return beyond(outputs, 0.08, 0.2)


def te_rmse(outputs: Outputs) -> bool:
    """Transformer Engine, fp8 attention tests: RMSE below 0.11 of the range of values (0.11 to 0.15; the strictest)."""
    out = outputs.out.double()
    value_range = torch.maximum(out.max(), outputs.want.max()) - torch.minimum(out.min(), outputs.want.min())
    return not bool(outputs.error.square().mean().sqrt() < 0.11 * value_range)


RULES: dict[str, Callable[[Outputs], bool]] = {
    "1e-2": close_1e_2,
    "FA 2x": flash_attention_2x,
    "FI-Bench": flashinfer_bench,
    "aiter .055": aiter_max_abs,
    "cuDNN fp8": cudnn_fp8,
    "TE RMSE": te_rmse,
}  # vllm_prefix stands apart: it is run on data of its own


def low_precision_attention(inputs: AttentionInputs, p_dtype: torch.dtype) -> torch.Tensor:
    """Unfused attention with every intermediate in the dtype of q, P in `p_dtype`: float64 [num_tokens, heads, dv].

    The yardstick of flash-attention's rule. Masks, soft cap, ALiBi and sinks as in references.attention.
    """
    outs, token, key = [], 0, 0
    dtype, group = inputs.q.dtype, inputs.q.shape[1] // inputs.k.shape[1]
    for query_len, seq_len in zip(inputs.query_lens, inputs.seq_lens, strict=True):
        q = inputs.q[token : token + query_len].transpose(0, 1)  # [heads, rows, d]
        k = inputs.k[key : key + seq_len].to(dtype).transpose(0, 1).repeat_interleave(group, 0)  # [heads, keys, d]
        v = inputs.v[key : key + seq_len].to(dtype).transpose(0, 1).repeat_interleave(group, 0)  # [heads, keys, dv]
        logits = q @ (k * inputs.softmax_scale).transpose(1, 2)  # [heads, rows, keys]
        p = _softmax(inputs, logits, query_len, seq_len).to(p_dtype).to(dtype)
        outs.append((p @ v).transpose(0, 1).double())
        token, key = token + query_len, key + seq_len
    return torch.cat(outs)


def _softmax(inputs: AttentionInputs, logits: torch.Tensor, query_len: int, seq_len: int) -> torch.Tensor:
    """Normalised P [heads, rows, keys] in the dtype of `logits`; zeros for a row that sees nothing."""
    if inputs.logits_soft_cap:
        logits = inputs.logits_soft_cap * torch.tanh(logits / inputs.logits_soft_cap)
    position = torch.arange(seq_len - query_len, seq_len, device=logits.device)
    distance = torch.arange(seq_len, device=logits.device) - position[:, None]  # [rows, keys]
    if inputs.alibi_slopes is not None:
        logits = logits + (inputs.alibi_slopes[:, None, None] * distance).to(logits.dtype)
    hidden = distance > 0 if inputs.causal else torch.zeros_like(distance, dtype=torch.bool)
    if inputs.sliding_window is not None:
        hidden = hidden | (-distance >= inputs.sliding_window)
    logits = logits.masked_fill(hidden, float("-inf"))
    if inputs.sinks is not None:
        sinks = inputs.sinks.to(logits.dtype)[:, None, None].expand(-1, query_len, 1)
        return torch.softmax(torch.cat((logits, sinks), dim=-1), dim=-1)[..., :-1]
    return torch.softmax(logits, dim=-1).nan_to_num(nan=0.0)
