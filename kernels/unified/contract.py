"""Contract of the unified paged kernel: everything in the cache, prefill and decode rows alike."""

from __future__ import annotations

from harness.cache.content import Content
from harness.case import Case
from harness.dispatch.predicate import Clause, Predicate
from harness.kernel.contract import Contract
from harness.kernel.numerics import NumericsProfile

_FEATURES = frozenset({
    "sliding_window", "noncausal", "logits_soft_cap", "alibi", "sinks", "sink_tokens", "softmax_scale", "split_kv",
    "head_size_v", "prefill", "strided_cache", "strided_inputs", "strided_workspace",
    "queries_before_keys",
})  # fmt: skip
_Q_AND_OUT = frozenset({"auto", "fp8_e4m3", "fp8_e4m3fnuz", "fp8_e5m2", "fp8_e5m2fnuz"})


_SPLIT: Predicate[Case] = Predicate(
    "split_kv",
    lambda case, platform: case,
    (Clause("splits", "no num_splits is given", lambda case: case.num_splits is not None),),
    kernels=("unified_paged_kernel", "split_kv_combine_kernel"),
    otherwise=("unified_paged_kernel",),
)

KERNELS: tuple[Contract, ...] = (
    Contract(
        name="unified_paged",
        about="one Triton kernel for prefill and decode rows over a paged cache, with optional split-KV",
        entry="unified_paged.py:launch",
        content=Content.ALL,
        features=_FEATURES,
        layouts=frozenset({"linear_nhd", "linear_3d", "hnd", "vllm_classic", "vectorized"}),
        page_tables=frozenset({"block_table", "kv_indices"}),
        kv_dtypes=frozenset({"auto", "fp8_e4m3", "fp8_e4m3fnuz", "fp8_e5m2", "fp8_e5m2fnuz", "int8"}),
        descales_per=frozenset({"tensor", "head", "page", "token"}),
        q_dtypes=_Q_AND_OUT,
        out_dtypes=_Q_AND_OUT,
        launches=("unified_paged_kernel", "split_kv_combine_kernel"),
        dispatch=_SPLIT,
        needs=("triton",),
        install_hint="pip install triton; on a CPU its interpreter runs the same source",
        numerics=NumericsProfile(kv_dequant="round_to_q", p_dtype="q", split_partial_dtype="fp32", mma="wgmma"),
    ),
)
