"""torch's own attention kernels as contracts: SDPA's backends and flex_attention on gathered, contiguous K and V.

Invariant: each backend is called by its own operator, so which kernel runs is no heuristic; none gets a mask, so rows
are decode rows, whole prompts, or not causal (`accepts`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from emulated import gathered

from harness.cache.content import Content
from harness.case import Case
from harness.kernel.arguments import LaunchArguments
from harness.kernel.contract import Contract
from harness.kernel.numerics import NumericsProfile
from harness.kernel.registry import Launcher
from references.attention import AttentionInputs

# q, k, v [1, heads, tokens, d] in the query dtype, causal (top left) or not, scale: out [1, heads, rows, dv] and, where
# the operator returns one, its LSE [1, heads, rows]
Operator = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, bool, float], tuple[torch.Tensor, torch.Tensor | None]]
FLEX = "flex"
_P_ROUNDED = NumericsProfile()
_P_FLOAT32 = NumericsProfile(p_dtype="fp32", mma="simt")


def accepts(case: Case) -> bool:
    """Whether the rows of `case` need no mask but a causal one of equal lengths.

    flex_attention is compiled for every shape, which takes seconds: it gets single sequences of one head geometry.
    """
    if case.kernel == FLEX and (case.rows.num_seqs, case.num_q_heads, case.gqa_ratio, case.head_size) != (1, 8, 4, 128):
        return False
    rows = zip(case.rows.query_lens, case.rows.context_lens, strict=True)
    return not case.causal or all(context == 0 or query == 1 for query, context in rows)


def _cpu_flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return out, lse


def _flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
    return out, lse


def _efficient(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)
    return out, lse[..., : q.shape[2]]  # its rows are padded to a multiple of 32


def _cudnn(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, scale=scale)
    return out, lse.reshape(q.shape[:3])


def _math(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale), None


def _causal(b: torch.Tensor, h: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return query >= key


@functools.cache
def _compiled_flex() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask

    mask = create_block_mask(_causal, None, None, q.shape[2], k.shape[2], device=q.device) if causal else None
    return _compiled_flex()(q, k, v, block_mask=mask, scale=scale, return_lse=True)


def _launch(operator: Operator, args: LaunchArguments) -> None:
    """One call of `operator` per sequence."""
    inputs, starts = gathered(args)
    first_key = 0
    for seq, seq_len in enumerate(inputs.seq_lens):
        rows, keys = slice(starts[seq], starts[seq + 1]), slice(first_key, first_key + seq_len)
        query_len = rows.stop - rows.start
        q, k, v = (_heads_first(inputs, x) for x in (args.q[rows], inputs.k[keys], inputs.v[keys]))
        out, lse = operator(q, k, v, args.causal and query_len > 1, args.softmax_scale)
        args.out[rows] = out[0].transpose(0, 1)
        if args.lse is not None:
            assert lse is not None
            args.lse[rows] = lse[0].transpose(0, 1)
        first_key = keys.stop


def _heads_first(inputs: AttentionInputs, x: torch.Tensor) -> torch.Tensor:
    """[tokens, heads, d] as contiguous [1, num_q_heads, tokens, d] in the dtype of q."""
    copies = inputs.q.shape[1] // x.shape[1]
    return x.to(inputs.q.dtype).transpose(0, 1).repeat_interleave(copies, 0).unsqueeze(0).contiguous()


def _backend(
    name: str, operator: Operator, numerics: NumericsProfile, dtypes: tuple[str, ...], lse: bool = True
) -> tuple[Contract, Launcher]:
    contract = Contract(
        name=name,
        about="torch on gathered, contiguous K and V, one sequence at a time",
        entry="",
        content=Content.ALL,
        features=frozenset({"noncausal", "prefill", "softmax_scale", "strided_cache", "strided_inputs"}),
        dtypes=frozenset(dtypes),
        descales_per=frozenset({"tensor", "page"}),
        returns_lse=lse,
        numerics=numerics,
    )
    return contract, functools.partial(_launch, operator)


_16_BIT = ("fp16", "bf16")
_CPU = (
    # On 16-bit inputs its exponential is good to 5e-5 only; P and the row sum share the error, the LSE shows it.
    _backend("sdpa_flash", _cpu_flash, _P_ROUNDED, _16_BIT, lse=False),
    _backend("sdpa_flash_fp32", _cpu_flash, _P_FLOAT32, ("fp32",)),
    _backend("sdpa_math", _math, _P_FLOAT32, ("fp32", *_16_BIT), lse=False),
)
_CUDA = (
    _backend("sdpa_flash", _flash, _P_ROUNDED, _16_BIT),
    _backend("sdpa_efficient", _efficient, _P_ROUNDED, _16_BIT),
    _backend("sdpa_efficient_fp32", _efficient, _P_FLOAT32, ("fp32",)),
    _backend("sdpa_cudnn", _cudnn, _P_ROUNDED, _16_BIT),
    _backend("sdpa_math", _math, _P_FLOAT32, ("fp32", *_16_BIT), lse=False),
    _backend(FLEX, _flex, _P_ROUNDED, _16_BIT),
)
BACKENDS = _CUDA if torch.cuda.is_available() else _CPU
