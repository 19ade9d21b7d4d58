"""Contract of the torch SDPA kernel: everything in the cache, any device torch runs on, float32 inside."""

from __future__ import annotations

from harness.cache.content import Content
from harness.kernel.contract import Contract
from harness.kernel.numerics import NumericsProfile

_FEATURES = frozenset({
    "sliding_window", "noncausal", "logits_soft_cap", "alibi", "sinks", "sink_tokens", "softmax_scale", "head_size_v",
    "prefill", "strided_cache", "strided_inputs", "queries_before_keys",
})  # fmt: skip

_Q_AND_OUT = frozenset({"auto", "fp8_e4m3", "fp8_e4m3fnuz", "fp8_e5m2", "fp8_e5m2fnuz"})

KERNELS: tuple[Contract, ...] = (
    Contract(
        name="torch_sdpa_paged",
        about="torch scaled_dot_product_attention over K and V gathered from the pages, one sequence at a time",
        entry="torch_sdpa_paged.py:launch",
        content=Content.ALL,
        features=_FEATURES,
        layouts=frozenset({"linear_nhd", "linear_3d", "hnd", "vllm_classic", "vectorized"}),
        page_tables=frozenset({"block_table", "kv_indices"}),
        kv_dtypes=frozenset({"auto", "fp8_e4m3", "fp8_e4m3fnuz", "fp8_e5m2", "fp8_e5m2fnuz", "int8"}),
        descales_per=frozenset({"tensor", "head", "page", "token"}),
        q_dtypes=_Q_AND_OUT,
        out_dtypes=_Q_AND_OUT,
        returns_lse=False,  # the public function returns none
        numerics=NumericsProfile(kv_dequant="round_to_q", p_dtype="fp32", mma="simt"),
    ),
)
