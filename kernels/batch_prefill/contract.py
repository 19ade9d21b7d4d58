"""Contracts of batch prefill: everything in the cache; q, K and V of one element type."""

from __future__ import annotations

from dataclasses import replace

from harness.cache.content import Content
from harness.case import Case
from harness.dispatch.batch_prefill import FP8, LINEAR, V3_MACHINE, V3_REQUEST
from harness.dispatch.predicate import ALL_HOLD, Predicate
from harness.kernel.contract import Contract
from harness.kernel.numerics import NumericsProfile

from .v3_conditions import V2_KERNEL, V3_CONDITIONS, V3_KERNEL, facts_of

_LARGEST_HEAD = 256
_V3_FEATURES = frozenset({
    "noncausal", "softmax_scale", "head_size_v", "prefill", "strided_cache", "strided_inputs", "queries_before_keys",
})  # fmt: skip
_V2_FEATURES = _V3_FEATURES | {"sliding_window", "logits_soft_cap", "alibi", "sinks", "sink_tokens"}
_ON_ROCM = Predicate(
    "aiter_batch_prefill",
    facts_of,
    (*V3_MACHINE, *V3_REQUEST),
    kernels=(V3_KERNEL,),
    otherwise=(V2_KERNEL,),
    platforms=("gfx942", "gfx950"),
)


def _not_batch_prefill(case: Case) -> str | None:
    if case.kv_dtype in FP8 and case.dtype != "bf16":
        return f"dtype {case.dtype} (fp8 inputs give bf16)"
    vector = 16 if case.kv_dtype in FP8 else 8
    sizes = (case.head_size, case.value_size)
    if max(sizes) > _LARGEST_HEAD or any(size % vector for size in sizes):
        return f"head_size {max(sizes)} (at most {_LARGEST_HEAD}, in whole vectors of 16 bytes)"
    return None


def _not_v3(case: Case) -> str | None:
    if clause := _not_batch_prefill(case):
        return clause
    decided = V3_CONDITIONS.decide(facts_of(case))
    return None if decided.branch == ALL_HOLD else decided.because


# Of V3: exact products of payloads, P in e4m3fn times 2^8; mma.sync multiplies both as float16 on sm_90. Folded
# descales round the exponent and the accumulator in float32 only, once a tile, which what is allowed for keys covers.
_V3_NUMERICS = NumericsProfile(kv_dequant="exact", p_dtype="fp8_e4m3", p_scale=2.0**8, mma="mma_sync", mma_k=16)
_V2_NUMERICS = NumericsProfile(kv_dequant="exact", p_dtype="q", p_fold_v=True, mma="wgmma")

_V2 = Contract(
    name="batch_prefill_v2",
    about="batch prefill, all layouts and score modifiers, in 16 bit or fp8",
    entry="batch_prefill_v2.py:launch",
    content=Content.ALL,
    features=_V2_FEATURES,
    dtypes=frozenset({"fp16", "bf16"}),
    kv_dtypes=frozenset({"auto", *FP8}),
    q_dtypes=frozenset({"auto", *FP8}),
    q_as_kv=True,
    descales_per=frozenset({"tensor", "page"}),
    layouts=frozenset({"linear_nhd", "linear_3d", "hnd", "vllm_classic", "vectorized"}),
    page_tables=frozenset({"block_table", "kv_indices"}),
    refuses=_not_batch_prefill,
    launches=(V2_KERNEL,),
    needs=("triton",),
    install_hint="pip install triton; on a CPU its interpreter runs the same source",
    numerics=_V2_NUMERICS,
)
KERNELS: tuple[Contract, ...] = (
    _V2,
    replace(
        _V2,
        name="batch_prefill_v3",
        about="batch prefill in fp8, linear layouts, tiles pipelined two deep, descales folded",
        entry="batch_prefill_v3.py:launch",
        features=_V3_FEATURES,
        dtypes=frozenset({"bf16"}),
        kv_dtypes=frozenset({"fp8_e4m3"}),
        q_dtypes=frozenset({"fp8_e4m3"}),
        layouts=LINEAR,
        refuses=_not_v3,
        launches=(V3_KERNEL,),
        numerics=_V3_NUMERICS,
    ),
    replace(
        _V2,
        name="batch_prefill",
        about="batch prefill as it is called: V3 where it can be, V2 otherwise",
        entry="batch_prefill.py:launch",
        launches=(V2_KERNEL, V3_KERNEL),
        dispatch=V3_CONDITIONS,
        elsewhere=(_ON_ROCM,),
        numerics_by_kernel=((V3_KERNEL, _V3_NUMERICS),),
    ),
)
