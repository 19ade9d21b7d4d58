"""Time and memory of the float64 reference, the tolerance and the judge, against plain float64 products.

    python benchmarks/reference_cost.py [--quick] [--json FILE] [--dtype fp16]

The plain product is, per sequence, Q K^T and P V in float64 with as many keys as its rows see on average: no fewer
multiplications than the reference needs, and nothing is masked, exponentiated or converted. `reference` is attend
alone, `total` adds the tolerance and the judgement of an output with its LSE (tiers 1 and L), `every tier` tier 2 and
the hull as well, with pages of 16; `cells/s` is how many cases a second one process judges in that way. `peak` is the
most memory that attend held beside its result, `bound` what it promises. `excess` is how much larger than exact the
moments are, which on GPUs are upper bounds; one that is too small ends the command with an error.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from common import finish, parser

MAX_ELEMENTS = 1 << 25
PAGE_SIZE = 16
MIXED = ((1, 1, 1, 1, 5, 129, 64, 33, 200, 1, 16), (1, 17, 1000, 4099, 18, 463, 1000, 33, 2048, 8192, 8192))


@dataclass(frozen=True)
class Shape:
    name: str
    query_lens: tuple[int, ...]
    seq_lens: tuple[int, ...]
    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_size: int = 128


SHAPES = (
    Shape("prefill 1024 @ 1024", (1024,), (1024,)),
    Shape("prefill 16 x 1024 @ 1024", (1024,) * 16, (1024,) * 16),
    Shape("prefill 2048 @ 8192", (2048,), (8192,)),
    Shape("prefill 2048 @ 32768", (2048,), (32768,)),
    Shape("prefill 32768 @ 32768", (32768,), (32768,)),
    Shape("decode 32 x 4096", (1,) * 32, (4096,) * 32),
    Shape("decode 8 x 8192", (1,) * 8, (8192,) * 8),
    Shape("decode 4 x 32768", (1,) * 4, (32768,) * 4),
    Shape("mixed batch of 11", *MIXED),
    Shape("10 x 500 @ 2048", (500,) * 10, (2048,) * 10, num_q_heads=64, num_kv_heads=64),
    Shape("small cell", (1, 5, 1, 17), (33, 40, 100, 17), num_q_heads=4, num_kv_heads=2, head_size=64),
)
QUICK = (
    Shape("prefill 128 @ 512", (128,), (512,), 4, 2, 64),
    Shape("decode 8 x 512", (1,) * 8, (512,) * 8, 4, 2, 64),
    SHAPES[-1],
)


def milliseconds(work: Callable[[], object], device: Any, repeats: int) -> float:
    """Median over `repeats`, after one run to warm up; the device is waited for."""
    import torch

    def once() -> float:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 1e3 * (time.perf_counter() - start)

    once()
    return statistics.median(once() for _ in range(repeats))


def plain_products(shape: Shape, device: Any) -> Callable[[], None]:
    """Q K^T and P V of every sequence, in pieces of at most MAX_ELEMENTS scores."""
    import torch

    group = shape.num_q_heads // shape.num_kv_heads
    pieces = []
    for query_len, seq_len in zip(shape.query_lens, shape.seq_lens, strict=True):
        num_keys = max(seq_len - query_len // 2, 1)  # what a row sees on average under a causal mask
        k = torch.randn(shape.num_kv_heads, num_keys, shape.head_size, dtype=torch.float64, device=device)
        rows = min(query_len * group, max(MAX_ELEMENTS // (shape.num_kv_heads * num_keys), 1))
        q = torch.randn(shape.num_kv_heads, rows, shape.head_size, dtype=torch.float64, device=device)
        pieces.append((q, k, query_len * group / rows))

    def run() -> None:
        for q, k, times in pieces:
            whole = int(times)
            for _ in range(whole):
                (q @ k.transpose(1, 2)) @ k
            if rest := round((times - whole) * q.shape[1]):
                (q[:, :rest] @ k.transpose(1, 2)) @ k

    return run


def memory_bound(shape: Shape) -> int:
    """Bytes of temporaries that attend promises to stay below; see there."""
    longest, size = max(shape.seq_lens), shape.head_size
    group = shape.num_q_heads // shape.num_kv_heads
    tile = max(MAX_ELEMENTS, group * max(longest, size + 1))
    batch = max(MAX_ELEMENTS, shape.num_kv_heads * longest * size)
    at_the_end = max(
        8 * sum(shape.query_lens) * shape.num_q_heads * size,
        sum(shape.seq_lens) * shape.num_kv_heads * (4 * size + 8 * 3),
    )
    return max(32 * tile + 8 * 6 * batch, at_the_end)


def moment_excess(got: Any, exact: Any) -> float:
    """Largest factor, less 1, by which sum p |v| exceeds its exact value. Raises RuntimeError where any falls short."""
    short = [
        bool((got.abs_pv < exact.abs_pv).any()),
        bool((got.flush_sum < exact.flush_sum).any()),
        bool((got.cast_sum + got.flush_sum < exact.cast_sum + exact.flush_sum).any()),
        bool((got.cast_square.sqrt() + got.flush_sum < exact.cast_square.sqrt() + exact.flush_sum).any()),
    ]
    if any(short):
        raise RuntimeError(f"moments below their exact values: {short}")
    return float((got.abs_pv / exact.abs_pv).nan_to_num_(nan=1.0).max()) - 1


def measure(shape: Shape, dtype: str, device: Any, repeats: int) -> dict[str, Any]:
    import torch

    from harness.dtypes import element_type
    from harness.kernel.numerics import NumericsProfile
    from harness.oracle.hull import judge_hull
    from harness.oracle.judge import judge
    from harness.oracle.matched_filter import PageFilter, find_gains
    from harness.oracle.tolerance import rounding_of, tolerance
    from references.attention import AttentionInputs, attend

    q_dtype, profile = element_type(dtype).torch, NumericsProfile()
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device).to(q_dtype)

    num_keys, size = sum(shape.seq_lens), shape.head_size
    inputs = AttentionInputs(
        q=normal(sum(shape.query_lens), shape.num_q_heads, size),
        k=normal(num_keys, shape.num_kv_heads, size).float(),
        v=normal(num_keys, shape.num_kv_heads, size).float(),
        query_lens=shape.query_lens,
        seq_lens=shape.seq_lens,
        softmax_scale=size**-0.5,
    )
    rounding = rounding_of(profile, dtype)
    first = attend(inputs, rounding, max_elements=MAX_ELEMENTS)
    out, lse = first.out.to(q_dtype), first.lse.float()
    result_bytes = sum(x.nbytes for x in vars(first).values() if isinstance(x, torch.Tensor))
    excess = moment_excess(first, attend(inputs, rounding, max_elements=MAX_ELEMENTS, moment_dtype=torch.float64))
    del first

    def reference() -> Any:
        return attend(inputs, rounding, max_elements=MAX_ELEMENTS)

    def total() -> None:
        want = reference()
        findings = judge(out, lse, want, tolerance(want, profile, dtype, size))
        if not findings.clean:
            raise RuntimeError(f"{shape.name}: the rounded reference does not pass its own tolerance")

    pages = tuple(tuple(range(-(-n // PAGE_SIZE))) for n in shape.seq_lens)
    filters = PageFilter(profile, dtype, PAGE_SIZE, pages, shape.seq_lens)

    def every_tier() -> None:
        total()
        gains, hull = find_gains(inputs, out, filters), judge_hull(inputs, out, profile, dtype)
        if gains.gains or hull.num_outside:
            raise RuntimeError(f"{shape.name}: the rounded reference does not pass tier 2 or the hull")

    peak = None
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        reference()
        peak = torch.cuda.max_memory_allocated(device) - before - result_bytes
    plain = milliseconds(plain_products(shape, device), device, repeats)
    return {
        "shape": shape.name,
        "plain_ms": plain,
        "reference_ms": milliseconds(reference, device, repeats),
        "total_ms": milliseconds(total, device, repeats),
        "every_tier_ms": milliseconds(every_tier, device, repeats),
        "peak_bytes": peak,
        "bound_bytes": memory_bound(shape),
        "moment_excess": excess,
    }


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--dtype", default="fp16", choices=("fp16", "bf16", "fp32"), help="of q and P (default: fp16)")
    chosen = options.parse_args()
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    titles = f"{'plain':>10}{'reference':>11}{'total':>10}{'total/plain':>13}{'every tier':>13}{'cells/s':>9}"
    print(f"{'shape':<24}{titles}{'peak/bound':>20}{'excess':>9}")
    for shape in QUICK if chosen.quick else SHAPES:
        row = measure(shape, chosen.dtype, device, repeats=3 if chosen.quick else 5)
        rows.append(row)
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
        memory = f"{peak}/{row['bound_bytes'] / 2**20:.0f} MiB"
        times = f"{row['plain_ms']:>7.2f} ms{row['reference_ms']:>8.2f} ms{row['total_ms']:>7.2f} ms"
        ratio, excess = row["total_ms"] / row["plain_ms"], row["moment_excess"]
        tiers = f"{row['every_tier_ms']:>10.2f} ms{1e3 / row['every_tier_ms']:>9.0f}"
        print(f"{row['shape']:<24}{times}{ratio:>12.1f}x{tiers}{memory:>20}{excess:>9.1%}", flush=True)
    finish({"dtype": chosen.dtype, "rows": rows}, chosen.json)


if __name__ == "__main__":
    main()
