"""Pages that left the window hold poison where the contract calls them dead: the cache proves it, and a kernel that
reads one before it masks is red in numbers, interpreted and compiled.

    python -m tests.cache.test_window cuda      one line of JSON: {case: [outcome, wrong elements are NaN]}
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from harness.cache.build import KVCache, build_cache
from harness.cache.content import Content
from harness.cache.poison import is_poison
from harness.cache.quantise import bits_of
from harness.cache.verify import verify_cache
from harness.cache.window import dead_columns, dead_pages
from harness.case import Case, Placement, Rows
from harness.errors import SetupBug
from harness.kernel.contract import Contract
from harness.problem.problem import Problem, build_problem
from harness.run.run_case import Options, run_case
from harness.run.setup import build_arguments, check_setup
from harness.session import PROJECT
from tests.access.faulty import KERNELS, faulty

ROWS = Rows("r", (1, 5, 1, 3, 1), (60, 62, 5, 40, -1))
CASE = Case("m", "k", ROWS, num_q_heads=4, gqa_ratio=2, head_size=24, sliding_window=20)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("content", Content)
def test_dead_is_what_no_row_sees(content: Content) -> None:
    """By hand: the oldest key seen is query - 19, of the oldest query; pages have 16 tokens."""
    firsts = (60 - 19, 62 - 19, 0, 40 - 19, 0)  # cut to what is cached: (61, 62 or 67, ...), which is more
    columns = dead_columns(CASE, content, "dead")
    assert columns == tuple(range(first // 16) for first in firsts)
    with_sinks = dead_columns(replace(CASE, sink_tokens=17), content, "dead")  # on two pages
    assert with_sinks == tuple(range(min(2, n // 16) if n else 0, n // 16) for n in firsts)
    assert dead_columns(CASE, content, "live") == (range(0),) * 5
    assert dead_columns(replace(CASE, sliding_window=None), content, "dead") == (range(0),) * 5


def test_a_page_that_another_sequence_still_sees_is_alive() -> None:
    assert dead_pages((range(2), range(1)), ((7, 8, 9), (7, 8))) == {7}
    assert dead_pages((range(2), range(0)), ((7, 8, 9), (7, 5))) == {8}
    assert dead_pages((range(0), range(0)), ((7, 8), (7, 5))) == frozenset()


def build(case: Case, content: Content = Content.ALL) -> tuple[Problem, KVCache]:
    problem = build_problem(case, "cpu")
    return problem, build_cache(problem, content, window_pages="dead")


@pytest.mark.parametrize("content", Content)
@pytest.mark.parametrize("layout", ["linear_nhd", "vllm_classic"])
@pytest.mark.parametrize("placement", ["shuffled", "shared_prefix"])
def test_dead_pages_are_poison_and_the_cache_proves_it(content: Content, layout: str, placement: str) -> None:
    for number, tail in enumerate(("nan", "loud", "nan")):
        case = replace(
            CASE,
            layout=layout,
            tail=tail,
            placement=Placement(placement, placement),
            kv_dtype=("auto", "fp8_e4m3", "int8")[number],
            descales_per=("tensor", "page", "token")[number] if placement == "shuffled" else "tensor",
            strides=("compact", "cache", "all")[number],
            rows=ROWS if placement == "shuffled" else Rows("r", (1, 1, 1), (90, 80, 33)),
        )
        problem, cache = build(case, content)
        verify_cache(problem, cache, content, "dead")
        assert cache.dead_pages
        dead, alive = sorted(cache.dead_pages), sorted({p for own in cache.pages for p in own} - cache.dead_pages)
        live = build_cache(problem, content)
        for tensor, other in ((cache.k, live.k), (cache.v, live.v)):
            assert bool(is_poison(tensor[dead]).all())
            assert not bool(is_poison(other[dead]).all())
            assert torch.equal(bits_of(tensor)[alive], bits_of(other)[alive])
        for name in ("kv_block_descale", "k_token_descale", "v_token_descale"):
            descales, all_of_them = getattr(cache, name), getattr(live, name)
            if descales is not None:
                assert bool(descales[dead].isnan().all())
                assert torch.equal(descales[alive].nan_to_num(), all_of_them[alive].nan_to_num())
        table = cache.block_table
        assert all(tuple(table[seq, : len(own)].tolist()) == own for seq, own in enumerate(cache.pages))


def test_what_is_left_on_a_dead_page_is_told() -> None:
    problem, cache = build(replace(CASE, kv_dtype="fp8_e4m3", descales_per="page"))
    live = build_cache(problem, Content.ALL)
    for left in (replace(cache, k=live.k), replace(cache, v=live.v)):
        with pytest.raises(SetupBug, match=r"poison in page \d+ \(out of the window\)"):
            verify_cache(problem, left, Content.ALL, "dead")
    with pytest.raises(SetupBug, match=r"NaN for K of kv head 0 in page \d+"):
        verify_cache(problem, replace(cache, kv_block_descale=live.kv_block_descale), Content.ALL, "dead")
    with pytest.raises(SetupBug, match="is poison"):
        verify_cache(problem, cache, Content.ALL, "live")
    verify_cache(problem, live, Content.ALL, "live")


@pytest.mark.parametrize("kernel", ["paged_decode", "torch_sdpa_paged"])
def test_arguments_with_dead_pages_are_no_fault_of_the_set_up(kernel: str) -> None:
    rows = Rows("r", (1, 1), (60, 33))
    case = replace(CASE, kernel=kernel, rows=rows)
    if kernel == "torch_sdpa_paged":
        case = replace(case, kv_dtype="fp8_e4m3", descales_per="page")
    contract = replace(KERNELS[kernel], window_pages="dead")
    setup = build_arguments(build_problem(case, "cpu"), contract)
    check_setup(setup, contract)
    assert setup.cache.dead_pages


def test_a_boundary_probe_can_have_dead_pages() -> None:
    case = Case(
        "m", "paged_decode", Rows("r", (1, 1), (40, 14)), num_q_heads=4, gqa_ratio=4, head_size=64, data="needle",
        sliding_window=20, boundary="elements31", boundary_target="k", boundary_position="far",
    )  # fmt: skip
    setup = build_arguments(build_problem(case, "cpu"), KERNELS["paged_decode"])
    check_setup(setup, KERNELS["paged_decode"])
    assert len(setup.cache.dead_pages) == 1


DECODES = Case(
    "m", "paged_decode", Rows("d", (1, 1), (60, 5)), num_q_heads=4, gqa_ratio=2, head_size=32, sliding_window=16
)
GATHERED = replace(DECODES, kernel="torch_sdpa_paged", rows=Rows("p", (3, 1), (60, 50)))


def attempts(folder: Path) -> dict[str, tuple[Contract, Case]]:
    """Case and kernel: honest, a kernel that loads a dead page and masks it afterwards, one that gathers all pages."""
    careless = faulty("paged_decode", folder, "cached & (key_pos >= oldest)", "cached")
    return {
        "honest": (KERNELS["paged_decode"], DECODES),
        "careless": (careless, DECODES),
        "careless, alive": (replace(careless, window_pages="live"), DECODES),
        "gathering": (replace(KERNELS["torch_sdpa_paged"], window_pages="dead"), GATHERED),
    }


EXPECTED = {"honest": "PASS", "careless": "FAIL", "careless, alive": "PASS", "gathering": "FAIL"}


def tell(device: str, folder: Path) -> dict[str, list[object]]:
    """Outcome of each, by numbers alone, and whether these are NaN."""
    told: dict[str, list[object]] = {}
    for name, (contract, case) in attempts(folder).items():
        verdict = run_case(case, contract, Options(device=device, access_trace=False))
        seen = (verdict.explanation or {}).get("rows", {}).get("seen", [])
        told[name] = [verdict.outcome.value, "every wrong element is NaN" in seen]
    return told


@pytest.mark.parametrize("device", DEVICES)
def test_a_kernel_that_reads_a_dead_page_is_red_in_numbers(device: str, tmp_path: Path) -> None:
    if device == "cpu":
        told = tell(device, tmp_path)
    else:  # in another process: this one interprets Triton
        command = [sys.executable, "-m", "tests.cache.test_window", device]
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
        told = json.loads(done.stdout.splitlines()[-1])
    assert told == {name: [outcome, outcome == "FAIL"] for name, outcome in EXPECTED.items()}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(tell(sys.argv[1], Path(scratch))))
