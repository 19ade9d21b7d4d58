"""The context: everything restored, no nesting, versions and import order checked, whole kernels right."""

# ruff: noqa: ANN001, ANN201 - arguments of kernels get their types at the launch.
from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from harness.errors import UsageError
from harness.interpreter import patches as patches_module
from harness.interpreter.errors import InterpreterUnsupported, NestedSession
from harness.interpreter.patches import Patches
from harness.interpreter.strict import check_version, strict_interpreter

CHECKOUT = Path(__file__).parents[2]
OWNERS = [tl, tl.core, tl.math, tl.tensor, tl.dtype, tl.core.tensor_descriptor_base]
OWNERS += [interpreter, interpreter.InterpretedFunction, interpreter.InterpreterBuilder]
# Chained conditions are objects of their own in newer versions.
OWNERS += [tl.condition] if hasattr(tl, "condition") else []
OWNERS += [interpreter.ReduceOps, interpreter.ScanOps, interpreter.interpreter_builder]


@triton.jit
def fill_kernel(out, value):
    tl.store(out + tl.arange(0, 16), value)


def snapshot() -> list[dict[str, object]]:
    # The builder keeps the grid of the last launch, which is no patch; Python makes annotations when asked for them.
    return [{k: v for k, v in vars(o).items() if not k.startswith(("grid_", "__annotations__"))} for o in OWNERS]


def test_everything_is_restored() -> None:
    with strict_interpreter():
        fill_kernel[(1,)](torch.zeros(16), 1.0)  # what Triton itself keeps of its first launch is there now
    before = snapshot()
    with strict_interpreter():
        fill_kernel[(1,)](torch.zeros(16), 1.0)
        assert snapshot() != before
    assert snapshot() == before
    with pytest.raises(ZeroDivisionError), strict_interpreter():
        raise ZeroDivisionError
    assert snapshot() == before


def test_a_failing_installation_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(patches: Patches, session: object) -> None:
        raise ZeroDivisionError

    before = snapshot()
    monkeypatch.setattr(patches_module, "_patch_memory", broken)
    with pytest.raises(ZeroDivisionError), strict_interpreter():
        pass
    assert snapshot() == before


def test_an_attribute_that_was_inherited_is_inherited_again() -> None:
    class Base:
        value = 1

    class Derived(Base):
        pass

    patches = Patches()
    patches.set_attr(Derived, "value", 2)
    patches.set_attr(Derived, "value", 3)
    patches.restore()
    assert "value" not in vars(Derived)


def test_sessions_do_not_nest() -> None:
    with strict_interpreter(), pytest.raises(NestedSession), strict_interpreter():
        pass
    with strict_interpreter():
        fill_kernel[(1,)](torch.zeros(16), 1.0)


@pytest.mark.parametrize("version", ["3.6.0", "3.7.1", "3.8.0", "3.9.0+git1234"])
def test_proved_versions_pass(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["3.5.1", "3.10.0", "4.0.0", "2.3", "main"])
def test_other_versions_are_refused(version: str) -> None:
    with pytest.raises(InterpreterUnsupported, match=r"proved on Triton 3\.6, 3\.7, 3\.8, 3\.9; found "):
        check_version(version)


def test_missing_private_part_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(interpreter.ReduceOps, "min_max")
    with pytest.raises(InterpreterUnsupported, match=r"ReduceOps\.min_max"), strict_interpreter():
        pass


def test_unknown_output_is_refused() -> None:
    with pytest.raises(ValueError, match="outputs name no buffer"), strict_interpreter({}, outputs={"out"}):
        pass


def test_tensors_elsewhere_are_refused() -> None:
    with strict_interpreter(), pytest.raises(UsageError, match="out lives on meta"):
        fill_kernel[(1,)](torch.zeros(16, device="meta"), 1.0)


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    env = {"PYTHONPATH": ":".join([str(CHECKOUT), *sys.path]), "PATH": "/usr/bin:/bin"}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


def test_preparing_after_a_compiling_import_is_refused() -> None:
    result = run_python("import triton\nfrom harness.interpreter import prepare\nprepare('cuda')\nprepare('cpu')")
    assert "InterpreterNotReady: triton was imported to compile kernels, but device 'cpu' needs it" in result.stderr


def test_preparing_for_a_gpu_after_an_interpreting_import_is_refused() -> None:
    code = "from harness.interpreter import prepare\nprepare('cpu')\nimport triton\nprepare('cpu')\nprepare('cuda:1')"
    assert "InterpreterNotReady: triton was imported to interpret kernels" in run_python(code).stderr


def test_preparing_imports_neither_torch_nor_triton() -> None:
    code = "import sys\nfrom harness.interpreter import prepare\nprepare('cpu')\n"
    code += "assert not {'torch', 'triton'} & set(sys.modules)"
    assert run_python(code).returncode == 0


def test_missing_triton_has_an_install_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InterpreterUnsupported, match="pip install triton"), strict_interpreter():
        pass


@triton.jit
def raising_kernel(out):
    tl.store(out + tl.arange(0, 16), tl.load(out + tl.arange(0, 32)))


def test_what_a_kernel_raises_arrives_as_interpreter_error() -> None:
    with pytest.raises(triton.runtime.errors.InterpreterError, match="raising_kernel"), strict_interpreter():
        raising_kernel[(1,)](torch.zeros(32))


@triton.jit
def window_kernel(x, out, n, LIMIT: tl.constexpr):
    pid = tl.program_id(0)
    if pid * 16 >= n:
        return
    total = tl.zeros([16], tl.float32)
    i = tl.arange(0, 16)
    for start in range(tl.maximum(n - 20, 0) // 16 * 16, tl.cdiv(n, 16) * 16, 16):
        pos = start + i
        total += tl.load(x + pos, mask=pos < n, other=0.0)
    total = tl.exp2(tl.log(tl.where(total > 0, total, 1.0)))
    tl.store(out + pid * 16 + i, tl.sum(total, 0) + tl.full([16], 0.0, tl.float32))


def test_early_return_and_runtime_loop_bounds() -> None:
    x, out = torch.rand(48), torch.zeros(64)
    with strict_interpreter({"x": x, "out": out}, outputs={"out"}):
        window_kernel[(4,)](x, out, 40, LIMIT=1)
    lanes = x[16:40].double().clone()
    total = torch.zeros(16, dtype=torch.float64)
    total += lanes[:16]
    total[:8] += lanes[16:]
    want = torch.exp2(torch.log(total)).sum()
    torch.testing.assert_close(out[:48].double(), want.expand(48), rtol=1e-5, atol=0)
    assert (out[48:] == 0).all()


@triton.jit
def decode_kernel(
    q, k_cache, v_cache, block_table, seq_lens, out, scale, k_scale, v_scale, stride_page: tl.int64,
    stride_table, D: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    seq = tl.program_id(0)
    n = tl.load(seq_lens + seq)
    d = tl.arange(0, D)
    h = tl.arange(0, 16)
    query = tl.load(q + (seq * 16 + h[:, None]) * D + d[None, :])
    m = tl.full([16], float("-inf"), tl.float32)
    norm = tl.zeros([16], tl.float32)
    acc = tl.zeros([16, D], tl.float32)
    for start in range(0, n, BLOCK):
        pos = start + tl.arange(0, BLOCK)
        live = pos < n
        page = tl.load(block_table + seq * stride_table + pos // PAGE, mask=live)
        at = page.to(tl.int64) * stride_page + (pos % PAGE) * D
        k = tl.load(k_cache + at[None, :] + d[:, None], mask=live[None, :], other=0.0).to(tl.float32) * tl.load(k_scale)
        v = tl.load(v_cache + at[:, None] + d[None, :], mask=live[:, None], other=0.0).to(tl.float32) * tl.load(v_scale)
        s = tl.where(live[None, :], tl.dot(query, k.to(query.dtype)) * scale, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        p = tl.exp(s - m_new[:, None])
        alpha = tl.exp(m - m_new)
        norm = norm * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None] + tl.dot(p.to(query.dtype), v.to(query.dtype))
        m = m_new
    tl.store(out + (seq * 16 + h[:, None]) * D + d[None, :], (acc / norm[:, None]).to(out.dtype.element_ty))


@pytest.mark.parametrize("kv", ["q", torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_paged_decode_with_poisoned_pages(dtype: torch.dtype, kv: str | torch.dtype) -> None:
    g = torch.Generator().manual_seed(4)
    pages, page, size = 9, 8, 32
    lens, table = [37, 1, 16], torch.tensor([[3, 1, 4, 0, 5], [2, 99, 99, 99, 99], [7, 6, 99, 99, 99]])
    stored = dtype if isinstance(kv, str) else kv
    k, v = (torch.randn(pages, page, size, generator=g).to(stored) for _ in range(2))
    flat = {s: [(int(table[s, t // page]), t % page) for t in range(n)] for s, n in enumerate(lens)}
    live = {slot for slots in flat.values() for slot in slots}
    for pool in (k, v):
        for slot in [(a, b) for a in range(pages) for b in range(page) if (a, b) not in live]:
            pool[slot] = torch.full((size,), float("nan")).to(stored)
    q = torch.randn(3, 16, size, generator=g).to(dtype)
    out = torch.full_like(q, float("nan"))
    k_scale, v_scale = torch.tensor([0.5]), torch.tensor([1.5])
    buffers = {"q": q, "k": k, "v": v, "table": table.int(), "lens": torch.tensor(lens).int(), "out": out}
    buffers |= {"k_scale": k_scale, "v_scale": v_scale}
    with strict_interpreter(buffers, outputs={"out"}, program_order_seed=7) as session:
        decode_kernel[(3,)](
            q, k, v, buffers["table"], buffers["lens"], out, 0.2, k_scale, v_scale, k.stride(0), 5, D=size,
            PAGE=page, BLOCK=16,
        )  # fmt: skip
    assert session.violations == []
    assert session.cross_launch_overwrites == 0
    for s, slots in flat.items():
        keys = torch.stack([k[slot] for slot in slots]).double() * 0.5
        values = torch.stack([v[slot] for slot in slots]).double() * 1.5
        want = torch.softmax(q[s].double() @ keys.T * 0.2, -1) @ values
        torch.testing.assert_close(out[s].double(), want, rtol=0, atol=2e-2 if dtype is torch.bfloat16 else 3e-3)


def test_modules_are_what_the_snapshot_covers() -> None:
    """Every owner that a session changes is one that the restoration test looks at."""
    owners = []

    class Watching(Patches):
        def set_attr(self, owner: object, name: str, value: object) -> None:
            owners.append(owner)
            super().set_attr(owner, name, value)

    namespace = types.SimpleNamespace(made=Watching)
    original, patches_module.Patches = patches_module.Patches, namespace.made  # type: ignore[misc]
    try:
        with strict_interpreter():
            pass
    finally:
        patches_module.Patches = original  # type: ignore[misc]
    assert owners
    assert all(any(owner is known for known in OWNERS) for owner in owners)
