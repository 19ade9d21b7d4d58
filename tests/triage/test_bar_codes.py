"""Bar codes read back: an honest output says nothing, a wrong one says which pages and tokens were attended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from harness.cache.build import build_cache
from harness.cache.content import Content
from harness.cache.effective import effective_kv
from harness.case import Case, Rows
from harness.dtypes import element_type
from harness.kernel.arguments import LaunchArguments
from harness.kernel.registry import find_kernels
from harness.problem.problem import Problem, build_problem
from harness.run.outcome import Outcome
from harness.run.plant import NO_PLANT
from harness.run.run_case import Options, run_case
from harness.triage.bar_codes import MAX_STATEMENTS, decode_bar_codes

CASE = Case("m", "k", Rows("r", (5, 1, 7), (40, 100, 20)), num_q_heads=4, gqa_ratio=2, head_size=64, data="bar_codes")
VARIANTS: dict[str, dict[str, object]] = {
    "plain": {},
    "bf16, e4m3, loud descales": {"dtype": "bf16", "kv_dtype": "fp8_e4m3", "descales_per": "page"},
    "fp16, e5m2": {"kv_dtype": "fp8_e5m2"},
    "window": {"sliding_window": 17},
    "sinks": {"sinks": True},
    "fp32, head 40": {"dtype": "fp32", "head_size": 40, "num_q_heads": 2, "gqa_ratio": 1},
}
Token = tuple[int, int, int | None]  # sequence, position, KV head (None: the right one)
Attended = Callable[[int, int, list[int]], list[Token]]  # (sequence, query position, positions to see) -> tokens


def right(seq: int, pos: int, keys: list[int]) -> list[Token]:
    return [(seq, key, None) for key in keys]


def decoded(case: Case, attended: Attended = right) -> list[str]:
    """What is read from the output of a kernel that attends alike to `attended`."""
    problem = build_problem(case, "cpu")
    _, values = effective_kv(problem, build_cache(problem, Content.ALL), Content.ALL)
    return decode_bar_codes(output(problem, values.double(), attended), problem, values)


def output(problem: Problem, values: torch.Tensor, attended: Attended) -> torch.Tensor:
    case, token = problem.case, 0
    out = torch.zeros(case.rows.num_tokens, case.num_q_heads, case.value_size, dtype=torch.float64)
    for seq, (query_len, context) in enumerate(zip(case.rows.query_lens, case.rows.context_lens, strict=True)):
        for pos in range(context, context + query_len):
            oldest = max(0, pos - (case.sliding_window or pos + 1) + 1)
            tokens = attended(seq, pos, list(range(oldest, pos + 1)))
            for head in range(case.num_q_heads):
                total = float(len(tokens)) + (0.0 if problem.sinks is None else float(problem.sinks[head].exp()))
                for s, key, kv_head in tokens:
                    own = head // case.gqa_ratio if kv_head is None else kv_head
                    out[token, head] += values[problem.key_start[s] + key, own] / total
            token += 1
    return out.to(element_type(case.dtype).torch)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_honest_output_says_nothing(variant: str) -> None:
    assert decoded(replace(CASE, **VARIANTS[variant])) == []  # type: ignore[arg-type]


@pytest.mark.parametrize("variant", ["plain", "bf16, e4m3, loud descales", "fp16, e5m2", "sinks"])
def test_a_page_read_in_place_of_another(variant: str) -> None:
    def swapped(seq: int, pos: int, keys: list[int]) -> list[Token]:
        return [(seq, key + 16 if seq == 1 and key // 16 == 3 else key, None) for key in keys]

    assert decoded(replace(CASE, **VARIANTS[variant]), swapped) == [  # type: ignore[arg-type]
        "sequence 1, position 100, heads all 4: page 3 attended 0 times, page 4 attended twice"
    ]


@pytest.mark.parametrize("variant", ["plain", "bf16, e4m3, loud descales", "window"])
def test_the_newest_token_and_the_next_one(variant: str) -> None:
    case = replace(CASE, **VARIANTS[variant])  # type: ignore[arg-type]
    assert decoded(case, lambda seq, pos, keys: right(seq, pos, keys[:-1])) == [
        "sequence 0, positions 40-44, heads all 4: the query's own position attended 0 times",
        "sequence 1, position 100, heads all 4: the query's own position attended 0 times",
        "sequence 2, positions 20-26, heads all 4: the query's own position attended 0 times",
    ]
    ends = case.rows.seq_lens
    assert decoded(
        case, lambda seq, pos, keys: right(seq, pos, [*keys, *([pos + 1] if pos + 1 < ends[seq] else [])])
    ) == [
        "sequence 0, positions 40-43, heads all 4: the position after the query attended once too often",
        "sequence 2, positions 20-25, heads all 4: the position after the query attended once too often",
    ]


def test_a_window_too_wide_or_too_narrow() -> None:
    case = replace(CASE, sliding_window=17, rows=Rows("r", (3,), (60,)))
    assert decoded(case, lambda seq, pos, keys: right(seq, pos, [keys[0] - 1, *keys])) == [
        "sequence 0, positions 60-62, heads all 4: the position before the window attended once too often"
    ]
    assert decoded(case, lambda seq, pos, keys: right(seq, pos, keys[1:])) == [
        "sequence 0, positions 60-62, heads all 4: the last position in the window attended 0 times"
    ]


def test_a_page_left_out_and_one_slot_of_all_pages() -> None:
    case = replace(CASE, rows=Rows("r", (1, 1), (100, 5)))
    assert decoded(case, lambda seq, pos, keys: right(seq, pos, [k for k in keys if k // 16 != 2])) == [
        "sequence 0, position 100, heads all 4: page 2 attended 0 times"
    ]
    case = replace(case, page_size=64, rows=Rows("r", (1,), (127,)))
    assert decoded(case, lambda seq, pos, keys: right(seq, pos, [k for k in keys if k % 64 not in (8, 9, 10, 11)])) == [
        "sequence 0, position 127, heads all 4: slots 8-11 of its pages attended 0 times"
    ]


def test_tokens_of_another_sequence_or_head() -> None:
    def stranger(seq: int, pos: int, keys: list[int]) -> list[Token]:
        return [(0 if seq == 2 and key // 16 == 1 else seq, key, None) for key in keys]

    for variant in ("plain", "bf16, e4m3, loud descales"):
        case = replace(CASE, **VARIANTS[variant])  # type: ignore[arg-type]
        assert decoded(case, stranger) == ["sequence 2, positions 20-26, heads all 4: tokens of sequence 0 attended"]
        assert decoded(case, lambda seq, pos, keys: [(seq, key, 1) for key in keys])[1] == (
            "sequence 1, position 100, heads 0-1: tokens of kv head 1 attended"
        )


def test_pages_beyond_the_code_are_named_together() -> None:
    case = replace(CASE, page_size=1, rows=Rows("r", (1,), (99,)))
    assert decoded(case, lambda seq, pos, keys: right(seq, pos, [k for k in keys if k != 40])) == [
        "sequence 0, position 99, heads all 4: pages 8, 40, 72 together attended with 2 instead of 3 tokens"
    ]


def test_what_cannot_be_read_is_said_so() -> None:
    problem = build_problem(CASE, "cpu")
    _, values = effective_kv(problem, build_cache(problem, Content.ALL), Content.ALL)
    out = output(problem, values.double(), right)
    out[5, 2, 7] = torch.nan
    assert decode_bar_codes(out, problem, values) == ["sequence 1, position 100, head 2: not finite"]
    noise = torch.rand(out.shape, generator=torch.Generator().manual_seed(0)).to(out.dtype)
    statements = decode_bar_codes(noise, problem, values)
    assert len(statements) == MAX_STATEMENTS + 1
    assert statements[-1].startswith("and ")
    with pytest.raises(ValueError, match="the data law is 'normal', not 'bar_codes'"):
        decode_bar_codes(out, build_problem(replace(CASE, data="normal"), "cpu"), values)


def test_a_failure_says_which_pages_were_attended() -> None:
    def misread(args: LaunchArguments) -> LaunchArguments:
        table = args.block_table.clone()
        table[1, 3] = table[1, 4]
        return replace(args, block_table=table)

    options = Options(device="cpu", contract_checks=False, plant=replace(NO_PLANT, arguments=misread))
    verdict = run_case(CASE, find_kernels()["torch_sdpa_paged"], options)
    assert verdict.outcome is Outcome.FAIL
    assert verdict.explanation is not None
    assert verdict.explanation["rows"]["attended"] == [
        "sequence 1, position 100, heads all 4: page 3 attended 0 times, page 4 attended twice"
    ]
