"""One test case: a frozen, hashable set of axis values. No tensors, no torch, nothing that depends on a machine.

Invariant: a Case together with its seeds is enough to build the same problem bit for bit anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Rows:
    """The batch: one (query_len, context_len) per sequence.

    A context_len may be negative, down to -query_len: then the first -context_len query rows lie before the first
    key and see no key at all (their output is 0 and their LSE -inf). `seq_len = context_len + query_len` is what the
    kernel is told; (1, -1) is the empty decode row that CUDA-graph padding produces.
    """

    name: str
    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.query_lens) != len(self.context_lens) or not self.query_lens:
            raise ValueError(f"rows '{self.name}': query_lens and context_lens must be equally long and not empty")

    @property
    def seq_lens(self) -> tuple[int, ...]:
        return tuple(q + c for q, c in zip(self.query_lens, self.context_lens, strict=True))

    @property
    def num_seqs(self) -> int:
        return len(self.query_lens)

    @property
    def num_tokens(self) -> int:
        return sum(self.query_lens)


@dataclass(frozen=True)
class Placement:
    """Which physical pages a sequence gets. kind: shuffled, sequential, reversed, shared_prefix or explicit."""

    kind: str = "shuffled"
    name: str = "shuffled"
    pages: tuple[tuple[int, ...], ...] = ()  # explicit only: page ids per sequence

    @property
    def repeats(self) -> bool:
        """Whether some sequence has a page twice; all its logical pages then hold the same tokens."""
        return any(len(set(pages)) < len(pages) for pages in self.pages)


@dataclass(frozen=True)
class Case:
    """Axis values of one case; the axes themselves (types, defaults, id fragments) are in harness.matrix.axes."""

    matrix: str
    kernel: str
    rows: Rows
    dtype: str = "fp16"  # fp32 | fp16 | bf16: new k and v, and whatever is auto
    kv_dtype: str = "auto"  # auto (= dtype) | fp8_e4m3 | fp8_e4m3fnuz | fp8_e5m2 | fp8_e5m2fnuz | int8: the cache
    descales_per: str = "tensor"  # tensor | head | page, token (of each KV head): what has a descale of its own
    descales: str = "loud"  # loud | quiet | equal | one: the law they are drawn by
    q_dtype: str = "auto"  # auto (= dtype) | fp8 words: what q is stored in
    out_dtype: str = "auto"  # auto | fp8 words: what the output is stored in
    num_q_heads: int = 8
    gqa_ratio: int = 1
    head_size: int = 128
    head_size_v: int | None = None  # None: the same as head_size
    page_size: int = 16
    layout: str = "linear_nhd"  # linear_nhd | linear_3d | hnd | vllm_classic | vectorized (harness.layout)
    strides: str = "compact"  # compact | cache (strided cache views) | all (q, k, v, out too)
    page_table: str = "block_table"  # block_table [num_seqs, max_pages] | kv_indices: kv_indptr, kv_page_indices
    table_padding: str = "poison_page"  # poison_page | out_of_range | exact
    tail: str = "nan"  # nan | loud: what lies behind the last token of a live page
    sliding_window: int | None = None  # keys a query sees, itself included
    causal: bool = True
    logits_soft_cap: float | None = None
    alibi: bool = False
    sinks: bool = False
    sink_tokens: int = 0  # so many leading tokens of a sequence are seen although a window has left them behind
    num_splits: int | None = None  # None: the kernel's own path without split-KV
    scale_factor: float = 1.125  # of the softmax scale, in 1/sqrt(head_size): not 1, so that a built-in scale shows
    placement: Placement = Placement()
    num_pages: int | None = None  # size of the pool; None: as many as the placement needs, and a few more
    pool: str = "auto"  # auto | dense | aliased (harness.cache.page_pool)
    writer: str | None = None  # name of the kernel that stores the new tokens; None: the cache is built with them
    steps: int = 1  # of a simulated engine over one cache; from 2 on `rows` are the requests (harness.problem.schedule)
    boundary: str | None = None  # where the pages of a boundary probe lie (harness.problem.boundary); None: no probe
    boundary_target: str = "kv"  # kv | k | v | descale | out | table | workspace | slots: whose addresses reach it
    boundary_position: str = "straddling"  # straddling | below | above | far
    data: str = "normal"
    geometry_seed: int = 0
    data_seed: int = 0

    def without_writer(self) -> Case:
        """The same on a cache that is built full: no slot mapping, and so no probe of one."""
        if self.boundary_target != "slots":
            return replace(self, writer=None)
        return replace(self, writer=None, boundary=None, boundary_target="kv", boundary_position="straddling")

    @property
    def num_kv_heads(self) -> int:
        return self.num_q_heads // self.gqa_ratio

    @property
    def value_size(self) -> int:
        """head_size of V."""
        return self.head_size if self.head_size_v is None else self.head_size_v

    @property
    def stored_dtype(self) -> str:
        """Name of the dtype the cache stores."""
        return self.dtype if self.kv_dtype == "auto" else self.kv_dtype

    @property
    def query_dtype(self) -> str:
        """Name of the dtype that q is handed over in."""
        return self.dtype if self.q_dtype == "auto" else self.q_dtype
