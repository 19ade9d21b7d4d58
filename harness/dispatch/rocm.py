"""When vLLM on ROCm decodes with its custom paged attention instead of Triton: a rule per family of architectures.

Invariant: the rules are those of the engine, its environment taken as it is by default; they can be asked anywhere.
The kernel that fails may be reached by few cells of a sweep only, so a sweep has to know which of its cells those are.
"""

from __future__ import annotations

from dataclasses import dataclass

from harness.case import Case
from harness.dispatch.predicate import Clause, Predicate

CUSTOM, TRITON = "paged_attention_rocm", "paged_decode_kernel"
GFX9 = ("gfx90a", "gfx942", "gfx950")
GFX1X = ("gfx1100", "gfx1101", "gfx1102", "gfx1150", "gfx1151", "gfx1200", "gfx1201")
LONGEST = 128 * 1024  # tokens


@dataclass(frozen=True)
class DecodeFacts:
    """What the engine looks at before it launches the decode kernel of a batch."""

    arch: str
    enabled: bool  # VLLM_ROCM_CUSTOM_PAGED_ATTN
    dtype: str  # of q
    kv_dtype: str  # auto: as q
    head_size: int
    page_size: int
    gqa_ratio: int
    max_seq_len: int
    sliding_window: int | tuple[int, int]  # 0 and (-1, -1): off
    alibi: bool
    sinks: bool
    packed: bool  # the pages of K and V follow each other without gaps

    @classmethod
    def of(cls, case: Case, platform: str) -> DecodeFacts | None:
        """Of a batch with decode rows; None for one without: the kernel that is launched then has nothing to do."""
        if 1 not in case.rows.query_lens:
            return None
        return cls(
            arch=platform,
            enabled=True,
            dtype=case.dtype,
            kv_dtype=case.kv_dtype,
            head_size=case.head_size,
            page_size=case.page_size,
            gqa_ratio=case.gqa_ratio,
            max_seq_len=max(case.rows.seq_lens),
            sliding_window=case.sliding_window or 0,
            alibi=case.alibi,
            sinks=case.sinks,
            packed=case.strides == "compact" and case.boundary is None,
        )


DecodeClause = Clause[DecodeFacts]


def _arch(known: tuple[str, ...]) -> DecodeClause:
    return DecodeClause("arch", f"not one of {', '.join(known)}", lambda f: f.arch in known, machine=True)


# Of both families; a page size that is no power of two comes before the sizes taken, or it could never decide.
_COMMON: tuple[DecodeClause, ...] = (
    DecodeClause("enabled", "VLLM_ROCM_CUSTOM_PAGED_ATTN is off", lambda f: f.enabled, machine=True),
    DecodeClause("window", "a sliding window is given", lambda f: f.sliding_window in (0, (-1, -1))),
    DecodeClause("dtype", "the dtype is neither fp16 nor bf16", lambda f: f.dtype in ("fp16", "bf16")),
    DecodeClause("sinks", "sinks are given", lambda f: not f.sinks),
    DecodeClause("max_seq_len", f"a sequence has more than {LONGEST:,} tokens", lambda f: f.max_seq_len <= LONGEST),
    DecodeClause("packed", "there are gaps between the pages", lambda f: f.packed),
    DecodeClause("page_size_power", "the page size is no power of two", lambda f: f.page_size & (f.page_size - 1) == 0),
)

GFX9_PAGED_ATTENTION = Predicate(
    "rocm_paged_attention",
    DecodeFacts.of,
    (
        _arch(GFX9),
        *_COMMON,
        DecodeClause("page_size", "the page size is neither 16 nor 32", lambda f: f.page_size in (16, 32)),
        DecodeClause("head_size", "the head size is neither 64 nor 128", lambda f: f.head_size in (64, 128)),
        DecodeClause("gqa_ratio", "more than 16 query heads per KV head", lambda f: 1 <= f.gqa_ratio <= 16),
    ),
    kernels=(CUSTOM,),
    otherwise=(TRITON,),
    platforms=GFX9,
)
GFX1X_PAGED_ATTENTION = Predicate(
    "rocm_paged_attention",
    DecodeFacts.of,
    (
        _arch(GFX1X),
        *_COMMON,
        DecodeClause("page_size", "the page size is not 16", lambda f: f.page_size == 16),
        DecodeClause("head_size", "the head size is not 128", lambda f: f.head_size == 128),
        DecodeClause("gqa_ratio", "not 3 to 16 query heads per KV head", lambda f: 3 <= f.gqa_ratio <= 16),
        DecodeClause("alibi", "ALiBi slopes are given", lambda f: not f.alibi),
        DecodeClause("kv_dtype", "the cache is quantised", lambda f: f.kv_dtype == "auto"),
    ),
    kernels=(CUSTOM,),
    otherwise=(TRITON,),
    platforms=GFX1X,
)
