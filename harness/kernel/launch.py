"""Launch: run one kernel on arguments already checked, and say which device kernels really ran.

Invariant: `ran` is observed at the launch of each device kernel, not claimed by the adapter; what the launch broke
(inputs changed, red zones written, settings of torch changed, a kernel that never ran) comes back as violations, never
as an exception, and no case leaves another torch to the next.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from harness.cache.pool import Pool
from harness.case import Case
from harness.errors import AttnregError
from harness.interpreter.errors import MemoryFault
from harness.kernel.arguments import LaunchArguments
from harness.kernel.failures import is_refused_launch, kernel_error, memory_shortage
from harness.kernel.guarded import GuardedOutput, checksum, fingerprint
from harness.kernel.registry import AnyContract, Launcher, WriterLauncher
from harness.kernel.torch_state import kept_torch_state
from harness.kernel.workspace import Workspaces
from harness.kernel.writer import WriterArguments, WriterContract

if TYPE_CHECKING:
    from harness.interpreter.trace import Trace  # needs numpy, which comes with triton

_OUTPUTS = ("out", "lse")  # of attention; of a writer the caches
_STORED = ("k_cache", "v_cache")
_TRACED = (
    "k_cache", "v_cache", "k", "v", "kv_block_descale", "k_token_descale", "v_token_descale", "block_table",
    "kv_page_indices",
)  # fmt: skip
_TRACED_PER_HEAD = ("k_scale", "v_scale")


@dataclass(frozen=True)
class LaunchResult:
    ran: tuple[str, ...]  # device kernels in order of first launch; the kernel's own name where none can be observed
    violations: tuple[str, ...]
    trace: Trace | None = None  # None where nothing was traced: not asked for, compiled, no Triton


def launch(
    contract: AnyContract,
    case: Case,
    launcher: Launcher | WriterLauncher,
    args: LaunchArguments | WriterArguments,
    outputs: tuple[GuardedOutput, ...],
    *,
    program_order_seed: int = 0,
    pools: Mapping[str, Pool] = MappingProxyType({}),
    trace_accesses: bool = False,
) -> LaunchResult:
    """Run `launcher` on `args` (compiled on a GPU, under the strict interpreter on a CPU) and observe it.

    trace_accesses: keep what interpreted programs load of K, V, descales and page table, and who stored the outputs.

    `pools` by argument name: of arguments that are no plain tensors, aliased ones among them. Of a boundary probe all
    of such a pool may be read: a wrong address then reads a decoy, on a CPU as on a GPU, instead of ending the kernel.

    Raises KernelRaised where the kernel raises, OutOfMemory where memory ran out in it; the error of a dead device
    context passes through as it is.
    """
    inputs = input_tensors(args)
    before = {name: _fingerprint(tensor, pools.get(name)) for name, tensor in inputs.items()}
    violations: list[str] = []
    trace = None
    device = args.k_cache.device
    with kept_torch_state(device) as changed:
        if "triton" not in sys.modules:  # loading the kernel imports it where it is used at all
            _call(launcher, args)
            ran: tuple[str, ...] = ()
        elif device.type == "cpu":
            reaching = pools if case.boundary is not None else {}
            around = {f"surroundings of {name}": pool.bytes for name, pool in reaching.items()}
            trace = _new_trace(case) if trace_accesses else None
            ran, broken = _interpreted(
                launcher, args, {**inputs, **around}, outputs, program_order_seed, contract.room, trace
            )
            violations += broken
        else:
            with observed_triton_launches() as names:
                _call(launcher, args)
            ran = tuple(dict.fromkeys(names))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    violations += [f"the kernel changed torch's {what} and left it so" for what in changed]
    violations += _which_ran(contract, case, ran)
    violations += [
        f"{name} was written by the kernel"
        for name, tensor in inputs.items()
        if _fingerprint(tensor, pools.get(name)) != before[name]
    ]
    violations += [overrun for output in (*outputs, *handed_out(args)) if (overrun := output.overrun())]
    unobservable = not ran and not contract.launches
    return LaunchResult((contract.name,) if unobservable else ran, tuple(violations), trace)


def input_tensors(args: LaunchArguments | WriterArguments) -> dict[str, torch.Tensor]:
    """The tensors a kernel may read and must not write, by argument name."""
    outputs = _STORED if isinstance(args, WriterArguments) else _OUTPUTS
    names = [field.name for field in fields(args) if field.name not in outputs]
    return {name: given for name in names if isinstance(given := getattr(args, name), torch.Tensor)}


def handed_out(args: LaunchArguments | WriterArguments) -> tuple[GuardedOutput, ...]:
    """The workspaces that the kernel took from `args` so far; a writer gets none."""
    if isinstance(args, WriterArguments):
        return ()
    return tuple(args.allocator.handed.values()) if isinstance(args.allocator, Workspaces) else ()


def _fingerprint(tensor: torch.Tensor, pool: Pool | None) -> tuple[int, ...]:
    """A checksum of all memory behind `tensor`, aliases once."""
    return (fingerprint(tensor),) if pool is None else tuple(checksum(part) for part in pool.parts())


def _call(launcher: Launcher | WriterLauncher, args: LaunchArguments | WriterArguments) -> None:
    try:
        launcher(args)  # type: ignore[arg-type]  # a launcher is called with arguments of its own kind
    except (AttnregError, KeyboardInterrupt):
        raise
    except BaseException as error:  # a kernel may raise anything, also what ends or skips a test: it is a failure
        if isinstance(error, torch.AcceleratorError) and not (memory_shortage(error) or is_refused_launch(error)):
            raise
        raise kernel_error(error) from error


def _interpreted(
    launcher: Launcher | WriterLauncher,
    args: LaunchArguments | WriterArguments,
    inputs: Mapping[str, torch.Tensor],
    outputs: tuple[GuardedOutput, ...],
    seed: int,
    room: Mapping[str, int],
    trace: Trace | None,
) -> tuple[tuple[str, ...], list[str]]:
    from harness.interpreter.strict import strict_interpreter  # needs numpy, which comes with triton

    def reachable(written: tuple[GuardedOutput, ...]) -> dict[str, torch.Tensor]:
        found = {output.name: output.tensor for output in written}
        around = ((output.name, output.surroundings) for output in written)
        return found | {f"surroundings of {name}": tensor for name, tensor in around if tensor is not None}

    written = reachable(outputs)
    interpreter = strict_interpreter(
        {**inputs, **written},
        outputs=set(written),
        program_order_seed=seed,
        room=room,
        trace=trace,
        workspaces=lambda: reachable(handed_out(args)),
    )
    cut = False
    with interpreter as session:
        try:
            _call(launcher, args)
        except MemoryFault:  # recorded by the session; the kernel ends there
            cut = True
    if trace is not None:
        trace.cut = cut
        trace.stores = {name: session.writers(name) for name in (output.name for output in outputs)}
    broken = [str(violation) for violation in session.violations]
    if session.cross_launch_overwrites:
        broken.append(f"{session.cross_launch_overwrites} elements were stored by one launch and again by a later one")
    return tuple(dict.fromkeys(launch.kernel for launch in session.launches)), broken


def _new_trace(case: Case) -> Trace:
    from harness.interpreter.trace import Trace

    return Trace((*_TRACED, *_TRACED_PER_HEAD) if case.descales_per == "head" else _TRACED)


def _which_ran(contract: AnyContract, case: Case, ran: tuple[str, ...]) -> list[str]:
    """What is wrong with the device kernels that ran; nothing where the contract names none (plain torch)."""
    if not contract.launches:
        return []
    if not ran:
        return ["no device kernel was launched: whatever the output holds, this kernel did not write it"]
    foreign = [name for name in ran if name not in contract.launches]
    missing = sorted(contract.must_launch(case) - set(ran))
    dispatch = None if isinstance(contract, WriterContract) else contract.dispatch
    decided = None if dispatch is None else dispatch.of(case)
    told = [f"launched {name}, which the contract of {contract.name} does not name" for name in foreign]
    if dispatch is None or decided is None:
        return told + [f"did not launch {name}, as the contract of {contract.name} says it does" for name in missing]
    astray = sorted((dispatch.every_kernel - {*decided.kernels}) & set(ran))
    why = f"against its dispatch '{dispatch.name}': {decided.because}"
    told += [f"did not launch {name}, {why}" for name in missing]
    return told + [f"launched {name}, {why}" for name in astray]


@contextmanager
def observed_triton_launches() -> Iterator[list[str]]:
    """Names of the compiled Triton kernels launched inside the block, in order."""
    from triton.runtime.jit import JITFunction

    names: list[str] = []
    original = JITFunction.run

    def run(self: Any, *args: Any, warmup: bool = False, **kwargs: Any) -> Any:
        if not warmup:
            names.append(self.fn.__name__)
        return original(self, *args, warmup=warmup, **kwargs)

    JITFunction.run = run
    try:
        yield names
    finally:
        JITFunction.run = original
