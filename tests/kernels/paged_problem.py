"""Small paged-attention problems and their dense float64 answer, for the tests of the kernels.

Invariant: whatever a kernel must not read is poison. Unused pages, tails of last pages, gaps between strided elements
and unwritten outputs are NaN; page-table padding holds ids outside the pool; descales are far from 1 and from each
other.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from harness.dtypes import element_type
from harness.interpreter.session import Session
from harness.interpreter.strict import strict_interpreter
from harness.kernel.arguments import LaunchArguments
from harness.kernel.contract import Contract
from harness.kernel.registry import IN_TREE, Launcher, load_entry

NAN = float("nan")
TOLERANCE = {"fp32": 2e-5, "fp16": 4e-3, "bf16": 3e-2}  # coarse: the oracle's derived tolerance is not under test here


@dataclass(frozen=True)
class Paged:
    """One problem; the fields mean what they mean in harness.case.Case."""

    query_lens: tuple[int, ...] = (5, 1, 20)
    context_lens: tuple[int, ...] = (30, 40, 0)
    dtype: str = "fp32"
    kv_dtype: str = "auto"
    num_kv_heads: int = 2
    gqa_ratio: int = 2
    head_size: int = 32
    head_size_v: int = 32
    page_size: int = 16
    layout: str = "linear_nhd"
    page_table: str = "block_table"
    strided: bool = False
    causal: bool = True
    window: int = 0
    sink_tokens: int = 0
    cap: float = 0.0
    alibi: bool = False
    sinks: bool = False
    num_splits: int = 0
    gain: float = 1.0  # of q: large gains spread the scores far beyond what exp can hold
    seed: int = 0

    @property
    def num_q_heads(self) -> int:
        return self.num_kv_heads * self.gqa_ratio

    @property
    def seq_lens(self) -> tuple[int, ...]:
        return tuple(q + c for q, c in zip(self.query_lens, self.context_lens, strict=True))


@dataclass(frozen=True)
class Built:
    dtype: str
    args: LaunchArguments
    out: torch.Tensor  # float64 [num_tokens, num_q_heads, head_size_v], what the kernel should answer
    lse: torch.Tensor  # float64 [num_tokens, num_q_heads]
    gaps: torch.Tensor  # storage around `out`, NaN but for `out` itself


def build(p: Paged, *, with_lse: bool = True) -> Built:
    generator = torch.Generator().manual_seed(p.seed)
    dtype, stored = element_type(p.dtype).torch, element_type(p.dtype if p.kv_dtype == "auto" else p.kv_dtype).torch
    k_scale, v_scale = (1.0, 1.0) if p.kv_dtype == "auto" else (0.3, 5.5)
    num_tokens, num_pages_of = sum(p.query_lens), [-(-max(n, 0) // p.page_size) for n in p.seq_lens]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    q, _ = _view((normal(num_tokens, p.num_q_heads, p.head_size) * p.gain).to(dtype), p.strided)
    out, gaps = _view(torch.full((num_tokens, p.num_q_heads, p.head_size_v), NAN, dtype=dtype), p.strided)
    lse, _ = _view(torch.full((num_tokens, p.num_q_heads), NAN), p.strided)
    keys = [(normal(max(n, 0), p.num_kv_heads, p.head_size) / k_scale).to(stored) for n in p.seq_lens]
    values = [(normal(max(n, 0), p.num_kv_heads, p.head_size_v) / v_scale).to(stored) for n in p.seq_lens]

    pages = torch.randperm(sum(num_pages_of) + 3, generator=generator).tolist()
    table = torch.full((len(p.seq_lens), max(1, *num_pages_of)), 2**31 - 1, dtype=torch.int32)
    k_pool = torch.full((len(pages), p.page_size, p.num_kv_heads, p.head_size), NAN).to(stored)
    v_pool = torch.full((len(pages), p.page_size, p.num_kv_heads, p.head_size_v), NAN).to(stored)
    for seq, count in enumerate(num_pages_of):
        for column in range(count):
            page = pages.pop()
            table[seq, column] = page
            chunk = slice(column * p.page_size, (column + 1) * p.page_size)
            for pool, tokens in ((k_pool, keys[seq]), (v_pool, values[seq])):
                pool[page, : tokens[chunk].shape[0]] = tokens[chunk]
    x = 8 if p.head_size % 8 == 0 else 1
    if p.layout in ("vllm_classic", "vectorized"):
        k_pool = k_pool.view(*k_pool.shape[:3], -1, x).permute(0, 2, 3, 1, 4).contiguous()
    if p.layout == "vllm_classic":
        v_pool = v_pool.permute(0, 2, 3, 1).contiguous()
    elif p.layout == "vectorized":
        v_pool = v_pool.view(len(v_pool), -1, x, *v_pool.shape[2:]).permute(0, 3, 1, 4, 2).contiguous()
    elif p.layout == "hnd":
        k_pool, v_pool = k_pool.transpose(1, 2).contiguous(), v_pool.transpose(1, 2).contiguous()
    elif p.layout == "linear_3d":
        k_pool, v_pool = k_pool[:, 0], v_pool[:, 0]
    listed: dict[str, torch.Tensor] = {}
    if p.page_table == "kv_indices":
        ids = [row[:count] for row, count in zip(table, num_pages_of, strict=True)]
        listed["kv_indptr"] = torch.tensor([0, *torch.tensor(num_pages_of).cumsum(0)], dtype=torch.int32)
        listed["kv_page_indices"] = torch.cat([*ids, torch.full((5,), 2**31 - 1, dtype=torch.int32)])
        last = [(n - 1) % p.page_size + 1 if n > 0 else 0 for n in p.seq_lens]
        listed["kv_last_page_len"] = torch.tensor(last, dtype=torch.int32)

    slopes = torch.rand(p.num_q_heads, generator=generator) if p.alibi else None
    sinks = normal(p.num_q_heads) + 1.0 if p.sinks else None
    args = LaunchArguments(
        q=q, k=None, v=None, k_cache=_view(k_pool, p.strided)[0], v_cache=_view(v_pool, p.strided)[0], layout=p.layout,
        block_table=None if listed else _view(table, p.strided)[0], **listed,
        query_start_loc=torch.tensor([0, *torch.tensor(p.query_lens).cumsum(0)], dtype=torch.int32),
        seq_lens=torch.tensor(p.seq_lens, dtype=torch.int32),
        max_query_len=max(p.query_lens), max_seq_len=max(p.seq_lens),
        k_scale=torch.tensor([k_scale]), v_scale=torch.tensor([v_scale]), kv_dtype=p.kv_dtype,
        softmax_scale=0.8 * p.head_size**-0.5, causal=p.causal, sliding_window=p.window, logits_soft_cap=p.cap,
        alibi_slopes=slopes, sinks=sinks, num_splits=p.num_splits, out=out, lse=lse if with_lse else None,
        sink_tokens=p.sink_tokens,
    )  # fmt: skip

    def dequantised(tokens: torch.Tensor, scale: float) -> torch.Tensor:
        return (tokens.float() * torch.tensor(scale)).to(dtype).double() if p.kv_dtype != "auto" else tokens.double()

    k = [dequantised(tokens, k_scale) for tokens in keys]
    v = [dequantised(tokens, v_scale) for tokens in values]
    want_out, want_lse = _dense(p, args, k, v)
    return Built(p.dtype, args, want_out, want_lse, gaps)


def _view(tensor: torch.Tensor, strided: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The tensor, or a view of the same values with gaps in every dimension, and the storage it lies in."""
    if not strided:
        return tensor, tensor
    fill = 2**31 - 1 if tensor.dtype == torch.int32 else NAN
    wide = torch.full([n + 3 for n in tensor.shape], fill, dtype=torch.float64).to(tensor.dtype)
    view = wide[tuple(slice(1, n + 1) for n in tensor.shape)]
    _bytes(view).copy_(_bytes(tensor))
    return view, wide


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


def _dense(
    p: Paged, args: LaunchArguments, keys: list[torch.Tensor], values: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention by its definition, row by row, in float64."""
    out = torch.zeros(sum(p.query_lens), p.num_q_heads, p.head_size_v, dtype=torch.float64)
    lse = torch.full((sum(p.query_lens), p.num_q_heads), -torch.inf, dtype=torch.float64)
    token = 0
    for seq, query_len in enumerate(p.query_lens):
        for query_pos in range(p.context_lens[seq], p.context_lens[seq] + query_len):
            last = min(query_pos, p.seq_lens[seq] - 1) if p.causal else p.seq_lens[seq] - 1
            first = max(query_pos - p.window + 1, 0) if p.window else 0
            seen = torch.tensor([*range(min(p.sink_tokens, first)), *range(first, last + 1)], dtype=torch.int64)
            for head in range(p.num_q_heads):
                kv_head = head // p.gqa_ratio
                k, v = keys[seq][seen, kv_head], values[seq][seen, kv_head]
                s = (k @ args.q[token, head].double()) * args.softmax_scale
                if p.cap:
                    s = p.cap * torch.tanh(s / p.cap)
                if args.alibi_slopes is not None:
                    s = s + args.alibi_slopes[head].double() * (seen - query_pos)
                logits = s if args.sinks is None else torch.cat([s, args.sinks[head].double().view(1)])
                if len(logits):
                    lse[token, head] = torch.logsumexp(logits, 0)
                    out[token, head] = torch.exp(s - lse[token, head]) @ v
            token += 1
    return out, lse


def run_strictly(launcher: Launcher, args: LaunchArguments) -> Session:
    """Launch under the strict interpreter: any address outside the arguments raises, other violations are recorded."""
    tensors = {f.name: t for f in fields(args) if isinstance(t := getattr(args, f.name), torch.Tensor)}
    with strict_interpreter(tensors, outputs={"out", "lse"} & tensors.keys()) as session:
        launcher(args)
    return session


def with_fault(contract: Contract, folder: Path, old: str, new: str) -> Launcher:
    """The kernel with `old` replaced by `new` in a copy of its family under `folder`, or of the shared files where the
    family does not have it; `old` must occur exactly once.
    """
    assert contract.folder is not None
    for name in ("_shared", contract.folder.name):
        shutil.copytree(IN_TREE / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    family = folder / contract.folder.name
    sources = {file: file.read_text() for file in family.glob("*.py")}
    if not any(old in text for text in sources.values()):
        sources = {file: file.read_text() for file in (folder / "_shared").glob("*.py")}
    assert sum(text.count(old) for text in sources.values()) == 1, f"{old!r} does not occur exactly once"
    for file, text in sources.items():
        file.write_text(text.replace(old, new))
    return load_entry(replace(contract, folder=family))


def wrong(built: Built) -> str | None:
    """What is wrong with the outputs a kernel wrote, or None."""
    tolerance = TOLERANCE[built.dtype]
    got = {"out": (built.args.out, built.out)}
    if built.args.lse is not None:
        got["lse"] = (built.args.lse, built.lse)
    for name, (have, want) in got.items():
        if not torch.allclose(have.double(), want, rtol=tolerance, atol=tolerance):
            return f"{name}: worst difference {(have.double() - want).abs().max().item():.3g}"
    if built.gaps is not built.args.out:
        written = built.gaps.isfinite().sum().item()
        if written != built.args.out.numel():
            return f"{written - built.args.out.numel()} elements stored outside out"
    return None
