"""Contract: what a kernel accepts and expects, declared beside the kernel, free of torch so that collecting is quick.

Invariant: whatever is handed to a kernel satisfies its contract (checked by harness.kernel.check before every launch);
whatever a contract does not admit is UNSUPPORTED, with the clause that says so, and is never run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from harness.cache.content import Content
from harness.case import Case
from harness.dispatch.predicate import Predicate
from harness.kernel.clauses import first_clause, wrong_words
from harness.kernel.numerics import NumericsProfile
from harness.kernel.over_read import BEHIND_THE_END, OverRead
from harness.kernel.writer import WriterContract
from harness.matrix.axes import TWIN_AXES

FEATURES: dict[str, str] = {
    "sliding_window": "a sliding window",
    "noncausal": "attention without a causal mask",
    "logits_soft_cap": "a soft cap on the logits",
    "alibi": "ALiBi slopes",
    "sinks": "attention sinks (one virtual logit per head)",
    "sink_tokens": "leading tokens that stay visible outside of the sliding window",
    "split_kv": "the split-KV path (num_splits)",
    "softmax_scale": "a softmax scale other than 1/sqrt(head_size) (scale_factor)",
    "head_size_v": "a V head size that differs from K's",
    "prefill": "rows with query_len > 1",
    "strided_cache": "non-contiguous views of the cache",
    "strided_inputs": "non-contiguous q, k, v and out",
    "strided_workspace": "scratch memory from `args.workspace`, by the strides it has",
    "queries_before_keys": "rows that see no key (negative context_len)",
}


@dataclass(frozen=True)
class Contract:
    """Declaration of one kernel. `entry` is "file:function" inside the kernel's folder, imported at launch only."""

    name: str
    about: str
    entry: str
    content: Content
    features: frozenset[str]
    dtypes: frozenset[str] = frozenset({"fp32", "fp16", "bf16"})
    kv_dtypes: frozenset[str] = frozenset({"auto", "fp8_e4m3", "fp8_e5m2"})
    descales_per: frozenset[str] = frozenset({"tensor"})  # what it takes descales for (harness.kernel.arguments)
    descales: frozenset[str] = frozenset({"loud", "quiet", "equal", "one"})
    q_dtypes: frozenset[str] = frozenset({"auto"})
    q_as_kv: bool = False  # whether q must be stored in the type of the cache
    out_dtypes: frozenset[str] = frozenset({"auto"})
    layouts: frozenset[str] = frozenset({"linear_nhd", "vllm_classic"})
    page_tables: frozenset[str] = frozenset({"block_table"})
    page_sizes: frozenset[int] | None = None  # None: any
    head_sizes: frozenset[int] | None = None  # None: any
    max_gqa_ratio: int | None = None  # None: any
    refuses: Callable[[Case], str | None] | None = None  # what else it does not take: the clause, or None
    index_dtype: str = "int32"
    tail: str = "nan"  # nan: loads behind the last token are masked | loud: masked after the product, so finite only
    window_pages: str = "live"  # live: pages that left the window are still there | dead: they must not be touched
    arithmetic_by: frozenset[str] = frozenset()  # of TWIN_AXES: another value sums in another order, with other bits
    over_reads: tuple[OverRead, ...] = ()  # known ones: provided, and nothing else is
    returns_lse: bool = True
    launches: tuple[str, ...] = ()  # names of the device kernels it may launch; () where they cannot be observed
    dispatch: Predicate[Any] | None = None  # which of them a case must launch; None: all of `launches`
    elsewhere: tuple[Predicate[Any], ...] = ()  # how the engine it stands for chooses on platforms that are not at hand
    needs: tuple[str, ...] = ()  # importable modules beyond torch, e.g. ("triton",)
    install_hint: str = ""  # one line: what to install when `needs` is not met
    numerics: NumericsProfile = field(default_factory=NumericsProfile)
    numerics_by_kernel: tuple[tuple[str, NumericsProfile], ...] = ()  # of device kernels that round otherwise
    folder: Path | None = None  # set by the registry
    writers: tuple[WriterContract, ...] = ()  # set by the registry: those that a case may name to fill the cache

    def __post_init__(self) -> None:
        """ValueError for a word that no matrix has: cases would be UNSUPPORTED for no reason of the kernel's."""
        if wrong := next(self._mistakes(), None):
            raise ValueError(f"contract of {self.name}: {wrong}")

    def _mistakes(self) -> Iterator[str]:
        content: Any = self.content
        if not isinstance(content, Content) or content is Content.WRITTEN:
            known = (one for one in Content if one is not Content.WRITTEN)
            yield f"content is {', '.join(map(str, known))}, not {content!r}"
        yield from wrong_words(self, {"features": frozenset(FEATURES), "arithmetic_by": frozenset(TWIN_AXES)})
        if self.dispatch is not None and (foreign := sorted(self.dispatch.every_kernel - set(self.launches))):
            yield f"dispatch leads to {foreign[0]}, which launches does not name"
        if strangers := sorted({name for name, _ in self.numerics_by_kernel} - set(self.launches)):
            yield f"numerics_by_kernel has {strangers[0]}, which launches does not name"
        if self.window_pages not in ("live", "dead"):
            yield f"window_pages is live or dead, not {self.window_pages!r}"

    def writer_of(self, case: Case) -> WriterContract | None:
        """The writer that fills the cache of `case`; None where it is built full, or no such writer is known."""
        return next((writer for writer in self.writers if writer.name == case.writer), None)

    def launches_of(self, case: Case) -> tuple[str, ...]:
        """The device kernels that `case` may launch, those of its writer included; () where some are not known."""
        writer = self.writer_of(case)
        by_kernel = (self.launches,) if writer is None else (self.launches, writer.launches)
        return tuple(name for names in by_kernel for name in names) if all(by_kernel) else ()

    def of_output(self, out_dtype: str, output_scale: float) -> Contract:
        """This contract where the output is stored in `out_dtype` (auto: as the numerics declare) at `output_scale`."""
        if out_dtype == "auto":
            return self
        return replace(self, numerics=replace(self.numerics, out_dtype=out_dtype, out_scale=output_scale))

    def over_read(self, buffer: str) -> int:
        """How far the kernel may read behind what it needs of `buffer`, in the units of OVER_READABLE."""
        return max((known.amount for known in self.over_reads if known.buffer == buffer), default=0)

    @property
    def room(self) -> dict[str, int]:
        """Elements behind the end of a buffer, by name, that the kernel may read: they are provided."""
        return {name: self.over_read(name) for name in BEHIND_THE_END}

    def must_launch(self, case: Case) -> frozenset[str]:
        """The device kernels without which `case` did not take the path it is for."""
        decided = None if self.dispatch is None else self.dispatch.of(case)
        return frozenset(self.launches if decided is None else decided.kernels)

    def rounding_as(self, case: Case) -> Contract:
        """This contract with the numerics of the device kernel that `case` must launch."""
        taken = self.must_launch(case)
        own = next((numerics for name, numerics in self.numerics_by_kernel if name in taken), self.numerics)
        return replace(self, numerics=own)

    def unsupported(self, case: Case) -> str | None:
        """The clause of this contract that `case` is outside of, or None where the case is admitted."""
        if clause := first_clause(self, case) or self._refused_writer(case):
            return clause
        if self.q_as_kv and case.q_dtype != case.kv_dtype:
            return f"q_dtype {case.q_dtype} with kv_dtype {case.kv_dtype} (q is stored as the cache is)"
        if self.max_gqa_ratio is not None and case.gqa_ratio > self.max_gqa_ratio:
            return f"gqa_ratio {case.gqa_ratio} (at most {self.max_gqa_ratio})"
        if case.tail == "nan" and self.tail != "nan":
            return "tail nan (tails are masked after the product: finite values only)"
        for feature in sorted(required_features(case) - self.features):
            return f"{feature} ({FEATURES[feature]})"
        return None if self.refuses is None else self.refuses(case)

    def _refused_writer(self, case: Case) -> str | None:
        if case.writer is None:
            return None
        if self.content is not Content.ALL:
            return f"writer {case.writer} (content class {self.content.value} does not find all tokens in the cache)"
        writer = self.writer_of(case)
        if writer is None:
            known = ", ".join(one.name for one in self.writers) or "none"
            return f"writer {case.writer} (known: {known})"
        clause = writer.unsupported(case)
        return clause and f"writer {writer.name}: {clause}"


def required_features(case: Case) -> frozenset[str]:
    """The features of FEATURES that a kernel needs to run `case`."""
    apart = case.boundary_target if case.boundary is not None else ""  # what lies far apart
    if apart == "table" and case.page_table == "kv_indices":
        apart = ""  # a list does not
    wanted = {
        "sliding_window": case.sliding_window is not None,
        "noncausal": not case.causal,
        "logits_soft_cap": case.logits_soft_cap is not None,
        "alibi": case.alibi,
        "sinks": case.sinks,
        "sink_tokens": case.sink_tokens > 0,
        "split_kv": case.num_splits is not None,
        "softmax_scale": case.scale_factor != 1.0,
        "head_size_v": case.value_size != case.head_size,
        "prefill": any(q > 1 for q in case.rows.query_lens),
        "strided_cache": case.strides != "compact" or apart in ("k", "v", "descale"),
        "strided_inputs": case.strides == "all" or apart in ("out", "table"),
        "strided_workspace": apart == "workspace",
        "queries_before_keys": any(c < 0 for c in case.rows.context_lens),
    }
    return frozenset(name for name, needed in wanted.items() if needed)
