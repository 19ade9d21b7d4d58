"""Memory: accesses outside buffers, stores to inputs, elements stored twice, order of programs."""

# ruff: noqa: ANN001, ANN201 - arguments of kernels get their types at the launch.
from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from harness.interpreter.errors import OutOfBounds, ReadOnlyStore
from harness.interpreter.memory import Buffer, Regions
from harness.interpreter.strict import strict_interpreter
from harness.interpreter.trace import Origin, Trace


@triton.jit
def copy_kernel(src, dst, n, offset, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(src + offset + i, mask=i < n, other=0.0)
    tl.store(dst + i, value, mask=i < n)


@triton.jit
def twice_kernel(dst, n):
    pid = tl.program_id(0)
    i = tl.arange(0, 16)
    tl.store(dst + pid * n + i, 1.0)


def line_of(kernel: object, below: int) -> int:
    return int(kernel.fn.__code__.co_firstlineno) + below  # type: ignore[attr-defined]


def test_load_past_the_end_names_buffer_distance_and_line() -> None:
    pool = torch.zeros(64)  # everything lies in one allocation: the stock interpreter reads on without a word
    src, dst = pool[:16], torch.zeros(16)
    copy_kernel[(1,)](src, dst, 16, 4, BLOCK=16)
    with strict_interpreter({"src": src, "dst": dst}, outputs={"dst"}) as session:
        copy_kernel[(1,)](src, dst, 16, 0, BLOCK=16)
        with pytest.raises(OutOfBounds) as caught:
            copy_kernel[(1,)](src, dst, 16, 4, BLOCK=16)
    line = line_of(copy_kernel, 3)
    assert str(caught.value) == (
        "copy_kernel: load of 4 bytes 4 bytes past the end of 'src' "
        f"(program (0, 0, 0), test_memory.py:{line} in copy_kernel)"
    )
    assert session.violations == [caught.value.violation]
    assert [launch.kernel for launch in session.launches] == ["copy_kernel", "copy_kernel"]


def test_load_before_the_start() -> None:
    pool = torch.zeros(64)
    with (
        strict_interpreter({"src": pool[16:32], "dst": torch.zeros(16)}),
        pytest.raises(OutOfBounds, match="8 bytes before the start of 'src'"),
    ):
        copy_kernel[(1,)](pool[16:32], torch.zeros(16), 16, -2, BLOCK=16)


def test_masked_lanes_may_point_anywhere() -> None:
    src, dst = torch.ones(4), torch.zeros(4)
    with strict_interpreter({"src": src, "dst": dst}) as session:
        copy_kernel[(1,)](src, dst, 4, 0, BLOCK=1024)
        copy_kernel[(1,)](src, dst, 0, 10**9, BLOCK=1024)
    assert (dst == 1).all()
    assert session.violations == []


def test_nothing_is_stored_before_the_check() -> None:
    pool = torch.zeros(64)
    with strict_interpreter({"dst": pool[:8]}), pytest.raises(OutOfBounds, match="store of 4 bytes"):
        twice_kernel[(1,)](pool[:8], 0)
    assert (pool == 0).all()


def test_store_to_an_input() -> None:
    src, dst = torch.ones(16), torch.zeros(16)
    with strict_interpreter({"src": src, "dst": dst}, outputs={"dst"}):
        copy_kernel[(1,)](src, dst, 16, 0, BLOCK=16)
        with pytest.raises(ReadOnlyStore, match=r"store of 4 bytes to an input, at byte 0 of 'src'"):
            copy_kernel[(1,)](dst, src, 16, 0, BLOCK=16)


def test_without_buffers_the_arguments_count() -> None:
    src, dst = torch.ones(64)[:16], torch.zeros(16)
    with strict_interpreter() as session:
        copy_kernel[(1,)](src, dst, 16, 0, BLOCK=16)
        with pytest.raises(OutOfBounds, match="past the end of 'src'"):
            copy_kernel[(1,)](src, dst, 16, 1, BLOCK=16)
    assert len(session.violations) == 1


def test_workspace_of_the_adapter_may_be_used() -> None:
    src, dst = torch.ones(16), torch.zeros(16)
    workspace = torch.zeros(16)
    with strict_interpreter({"src": src, "dst": dst}, outputs={"dst"}) as session:
        copy_kernel[(1,)](src, workspace, 16, 0, BLOCK=16)
        copy_kernel[(1,)](workspace, dst, 16, 0, BLOCK=16)
    assert (dst == 1).all()
    assert session.violations == []


def test_wider_view_of_a_registered_allocation_does_not_widen_the_buffer() -> None:
    pool, dst = torch.ones(64), torch.zeros(16)
    with strict_interpreter({"src": pool[:16], "dst": dst}), pytest.raises(OutOfBounds):
        copy_kernel[(1,)](pool, dst, 16, 8, BLOCK=16)


def test_strided_view_counts_as_its_extent() -> None:
    pool = torch.arange(64.0).reshape(4, 16)
    view = pool[:, :8]  # extent: 3 * 16 + 8 elements
    dst = torch.zeros(64)
    with strict_interpreter({"src": view, "dst": dst}):
        copy_kernel[(1,)](view, dst, 56, 0, BLOCK=64)
        with pytest.raises(OutOfBounds):
            copy_kernel[(1,)](view, dst, 57, 0, BLOCK=64)


def test_interleaved_views_are_one_region() -> None:
    kv = torch.zeros(4, 2, 8)
    k, v, other = Buffer.of("k", kv[:, 0], False), Buffer.of("v", kv[:, 1], False), Buffer.of("o", torch.ones(3), True)
    regions = Regions([v, other, k])
    assert sorted(zip(regions.starts, regions.ends, strict=True)) == sorted(
        [(k.start, v.end), (other.start, other.end)]
    )
    addresses = np.array([k.start, v.end - 4, v.end, other.start], dtype=np.uint64)
    assert (regions.place(addresses, 4) >= 0).tolist() == [True, True, v.end == other.start, True]


def test_two_programs_storing_one_element() -> None:
    dst = torch.zeros(64)
    with strict_interpreter({"dst": dst}) as session:
        twice_kernel[(3,)](dst, 16)
        assert session.violations == []
        assert session.cross_launch_overwrites == 0
        twice_kernel[(2,)](dst, 8)
    (violation,) = session.violations
    assert violation.kind == "double_store"
    assert violation.message == "stored 8 elements that another program stored, first at byte 32 of 'dst', element [8]"
    assert violation.where == f"test_memory.py:{line_of(twice_kernel, 4)} in twice_kernel"
    assert session.cross_launch_overwrites == 16 + 8


@triton.jit
def accumulate_kernel(dst):
    i = tl.arange(0, 16)
    for _ in range(3):
        tl.store(dst + i, tl.load(dst + i) + 1.0)


def test_one_program_may_store_an_element_again() -> None:
    dst = torch.zeros(16)
    with strict_interpreter({"dst": dst}) as session:
        accumulate_kernel[(1,)](dst)
    assert (dst == 3).all()
    assert session.violations == []


@triton.jit
def order_kernel(counter, order):
    turn = tl.load(counter)
    here = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + tl.program_id(2)
    tl.store(order + turn, here)
    tl.store(counter, turn + 1)


def run_order(seed: int) -> list[int]:
    counter, order = torch.zeros(1, dtype=torch.int32), torch.full((24,), -1, dtype=torch.int32)
    with strict_interpreter(program_order_seed=seed) as session:
        order_kernel[(2, 3, 4)](counter, order)
    assert session.launches[0].grid == (2, 3, 4)
    assert session.launches[0].order_seed == (seed, 0)
    assert [v.kind for v in session.violations] == ["double_store"]  # the counter: exactly such a race
    return order.tolist()


def test_programs_run_once_each_in_an_order_that_the_seed_decides() -> None:
    first = run_order(0)
    assert sorted(first) == list(range(24))
    assert first != list(range(24))
    assert run_order(0) == first
    assert run_order(1) != first


@triton.jit
def atomic_kernel(counter, offset):
    tl.atomic_add(counter + offset, 1)


def test_atomics_are_checked_and_no_double_store() -> None:
    pool = torch.zeros(8, dtype=torch.int32)
    with strict_interpreter({"counter": pool[:1]}) as session:
        atomic_kernel[(5,)](pool, 0)
        assert session.violations == []
        with pytest.raises(OutOfBounds, match="atomic of 4 bytes"):
            atomic_kernel[(1,)](pool, 1)
    assert pool.tolist() == [5] + [0] * 7


def test_a_store_between_the_rows_of_an_output_is_recorded() -> None:
    view = torch.zeros(4, 16)[:, :8]
    with strict_interpreter({"dst": view}) as session:
        for row in range(3):
            copy_kernel[(1,)](torch.ones(64), view[row], 8, 0, BLOCK=8)
        assert session.violations == []
        copy_kernel[(1,)](torch.ones(64), view[1], 11, 0, BLOCK=16)
    (violation,) = session.violations
    assert violation.kind == "stray_store"
    assert violation.message == "stored 3 elements outside its rows, first at byte 96 of 'dst'"


def test_a_trace_keeps_the_unmasked_lanes_of_loads_and_who_stored_what() -> None:
    src, dst, trace = torch.ones(16), torch.zeros(24), Trace(["src"])
    with strict_interpreter({"src": src, "dst": dst}, outputs={"dst"}, trace=trace) as session:
        copy_kernel[(1,)](src, dst, 5, 0, BLOCK=16)
        twice_kernel[(1,)](dst[8:], 0)
        assert session.writers("dst").tolist() == [1] * 5 + [0] * 3 + [2] * 16
    (load,) = trace.loads["src"]
    assert (load.rows[:, None] + load.cols).reshape(-1).tolist() == [src.data_ptr() + 4 * i for i in range(5)]
    assert trace.lines[load.line] == f"test_memory.py:{line_of(copy_kernel, 3)}"
    assert trace.programs == [Origin("copy_kernel", 0, (0, 0, 0)), Origin("twice_kernel", 1, (0, 0, 0))]


@triton.jit
def read_row(src, i):
    return tl.load(src + i)


@triton.jit
def calling_kernel(src, dst):
    i = tl.arange(0, 16)
    tl.store(dst + i, read_row(src, i))


def test_a_trace_names_the_line_of_the_load_and_of_the_kernel() -> None:
    src, trace = torch.ones(16), Trace(["src"])
    with strict_interpreter({"src": src, "dst": torch.zeros(16)}, trace=trace):
        calling_kernel[(1,)](src, torch.zeros(16))
    inner, outer = line_of(read_row, 2), line_of(calling_kernel, 3)
    assert trace.lines == [f"test_memory.py:{inner} from test_memory.py:{outer}"]


@triton.jit
def pass_on_kernel(src, dst, shift, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(dst + i, tl.load(src + i + shift))


@triton.jit
def exchange_kernel(workspace, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    tl.store(workspace + pid * BLOCK + i, 1.0)
    tl.store(workspace + (2 + pid) * BLOCK + i, tl.load(workspace + (1 - pid) * BLOCK + i))


def test_a_trace_follows_what_programs_store_and_others_load() -> None:
    trace, workspace = Trace(["src"]), torch.zeros(64)
    buffers = {"src": torch.ones(64), "dst": torch.zeros(64)}
    with strict_interpreter(buffers, outputs={"dst"}, trace=trace) as session:
        pass_on_kernel[(4,)](buffers["src"], workspace, 0, BLOCK=16)
        pass_on_kernel[(2,)](workspace, buffers["dst"], 8, BLOCK=16)
        writers = session.writers("dst")
    assert session.violations == []
    program = {origin: number for number, origin in enumerate(trace.programs, 1)}
    first = [program[Origin("pass_on_kernel", 0, (i, 0, 0))] for i in range(4)]
    second = [program[Origin("pass_on_kernel", 1, (i, 0, 0))] for i in range(2)]
    assert trace.sources == {second[0]: {first[0], first[1]}, second[1]: {first[1], first[2]}}
    assert trace.unstored == set()
    assert writers.tolist() == [second[0]] * 16 + [second[1]] * 16 + [0] * 32


@pytest.mark.parametrize("seed", range(4))
def test_a_race_is_recorded_whatever_the_order_of_programs(seed: int) -> None:
    workspace = torch.zeros(64)
    with strict_interpreter({"w": workspace}, program_order_seed=seed, trace=Trace([])) as session:
        exchange_kernel[(1,)](workspace[16:], BLOCK=16)  # one program cannot race
        assert session.violations == []
        exchange_kernel[(2,)](workspace, BLOCK=16)
    (violation,) = session.violations
    assert violation.kind == "race"
    assert violation.message.startswith("loaded 16 elements that another program of this launch stores, first at byte ")
    assert violation.where == f"test_memory.py:{line_of(exchange_kernel, 5)} in exchange_kernel"


def test_atomics_order_programs_and_are_not_followed() -> None:
    counter, trace = torch.zeros(8, dtype=torch.int32), Trace([])
    with strict_interpreter({"counter": counter}, trace=trace) as session:
        atomic_kernel[(5,)](counter, 0)
    assert trace.atomics
    assert session.violations == []


def test_room_behind_a_buffer_may_be_loaded_and_not_more() -> None:
    pool, dst = torch.ones(64), torch.zeros(16)
    buffers = {"src": pool[:16], "dst": dst}
    with strict_interpreter(buffers, outputs={"dst"}, room={"src": 4}):
        copy_kernel[(1,)](pool[:16], dst, 16, 4, BLOCK=16)
        with pytest.raises(OutOfBounds, match="past the end of 'src'"):
            copy_kernel[(1,)](pool[:16], dst, 16, 5, BLOCK=16)


def test_arguments_are_used_in_place() -> None:
    """A pool of a large address range is neither copied nor read."""
    src = torch.zeros(1).expand(2**33)  # 32 GiB of addresses on 4 bytes
    dst = torch.zeros(4)
    with strict_interpreter({"dst": dst}):
        copy_kernel[(1,)](src, dst, 1, 0, BLOCK=4)
    assert (dst == 0).all()
