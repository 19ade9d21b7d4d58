"""Contracts of the chunked-prefill family: what each kernel finds in the cache, and how it rounds."""

from __future__ import annotations

from harness.cache.content import Content, is_decode
from harness.case import Case
from harness.dispatch.predicate import Clause, Predicate
from harness.dispatch.rocm import GFX1X_PAGED_ATTENTION, GFX9_PAGED_ATTENTION
from harness.kernel.contract import Contract
from harness.kernel.numerics import NumericsProfile

_PREFILL = NumericsProfile(kv_dequant="round_to_q", p_dtype="q", sum_after_cast=False, out_dtype="q", mma="wgmma")
_DECODE = NumericsProfile(kv_dequant="round_to_q", p_dtype="q", sum_after_cast=False, out_dtype="q", mma="mma_sync")

_COMMON = frozenset({
    "sliding_window", "noncausal", "logits_soft_cap", "alibi", "sinks", "softmax_scale", "head_size_v",
    "strided_cache", "strided_inputs", "queries_before_keys",
})  # fmt: skip
_PREFILL_TOO = _COMMON | {"prefill"}
_KV_DTYPES = frozenset({"auto", "fp8_e4m3", "fp8_e4m3fnuz", "fp8_e5m2", "fp8_e5m2fnuz", "int8"})
_DESCALES_PER = frozenset({"tensor", "head"})
_LAYOUTS = frozenset({"linear_nhd", "hnd", "vllm_classic"})
_INSTALL = "Install triton 3.6 or newer; on a CPU it runs under the interpreter (TRITON_INTERPRET=1)."


def _query_lens(case: Case, platform: str) -> tuple[int, ...]:
    return case.rows.query_lens


# paged_decode_kernel is launched for every batch, as only the device knows which rows are decode rows.
_BY_PHASE: Predicate[tuple[int, ...]] = Predicate(
    "rows",
    _query_lens,
    (
        Clause("prefill", "no row is prefill", lambda lens: max(lens) > 1, kernels=("paged_decode_kernel",)),
        Clause("decode", "no row is decode", lambda lens: any(is_decode(n) for n in lens)),
    ),
    kernels=("prefix_prefill_kernel", "paged_decode_kernel"),
    otherwise=("prefix_prefill_kernel", "paged_decode_kernel"),
)

KERNELS: tuple[Contract, ...] = (
    Contract(
        name="prefix_prefill",
        about="prefill over a paged prefix; new tokens arrive as k and v",
        entry="prefix_prefill.py:launch",
        content=Content.CONTEXT,
        kv_dtypes=_KV_DTYPES,
        descales_per=_DESCALES_PER,
        features=_PREFILL_TOO,
        layouts=_LAYOUTS,
        launches=("prefix_prefill_kernel",),
        needs=("triton",),
        install_hint=_INSTALL,
        numerics=_PREFILL,
    ),
    Contract(
        name="paged_decode",
        about="one query token per row; the whole row is in the cache",
        entry="paged_decode.py:launch",
        content=Content.ALL,
        kv_dtypes=_KV_DTYPES,
        descales_per=_DESCALES_PER,
        features=_COMMON,
        layouts=_LAYOUTS,
        window_pages="dead",  # no key in front of the window is loaded
        launches=("paged_decode_kernel",),
        needs=("triton",),
        install_hint=_INSTALL,
        numerics=_DECODE,
    ),
    Contract(
        name="chunked_prefill_paged_decode",
        about="mixed batches: prefix_prefill for prefill rows, paged_decode for decode rows",
        entry="chunked_prefill_paged_decode.py:launch",
        content=Content.BY_PHASE,
        kv_dtypes=_KV_DTYPES,
        descales_per=_DESCALES_PER,
        features=_PREFILL_TOO,
        layouts=_LAYOUTS,
        launches=("prefix_prefill_kernel", "paged_decode_kernel"),
        dispatch=_BY_PHASE,
        elsewhere=(GFX9_PAGED_ATTENTION, GFX1X_PAGED_ATTENTION),
        needs=("triton",),
        install_hint=_INSTALL,
        numerics=_PREFILL,
    ),
)
