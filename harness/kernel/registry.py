"""Kernels found by folder or entry point and loaded by path, never imported by name.

Invariant: every folder of kernels becomes a private package (a public package already owns `import kernels`); contracts
are loaded when kernels are listed, implementations (and torch, triton) only when a kernel is launched.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import overload

from harness.errors import AttnregError, KernelNotFound, KernelRaised
from harness.kernel.arguments import LaunchArguments
from harness.kernel.contract import Contract
from harness.kernel.writer import WriterArguments, WriterContract

IN_TREE = Path(__file__).resolve().parents[2] / "kernels"
ENTRY_POINT_GROUP = "attnreg.kernels"
_PACKAGE = "_attnreg_kernels"
_CHANGED = "__attnreg_changed__"  # in a kernel's module: what its import changed of torch

Launcher = Callable[[LaunchArguments], None]
WriterLauncher = Callable[[WriterArguments], None]
AnyContract = Contract | WriterContract


def find_kernels(folders: Iterable[Path] = ()) -> dict[str, Contract]:
    """Contracts of attention kernels by name: the in-tree folders, `folders`, then installed entry points. Each knows
    the writers that were found beside it.

    A folder of kernels holds family folders, each with a contract.py that defines KERNELS, a tuple of contracts of
    attention kernels and of cache writers. An entry point of group `attnreg.kernels` names an iterable of contracts
    whose `entry` is "module:function".
    Raises KernelNotFound for a folder without families, and for a name that is declared twice.
    """
    found = _by_name(folders)
    writers = tuple(contract for contract in found.values() if isinstance(contract, WriterContract))
    attention = {name: contract for name, contract in found.items() if isinstance(contract, Contract)}
    return {name: replace(contract, writers=writers) for name, contract in attention.items()}


def find_writers(folders: Iterable[Path] = ()) -> dict[str, WriterContract]:
    """Contracts of cache writers by name, found as kernels are."""
    return {name: contract for name, contract in _by_name(folders).items() if isinstance(contract, WriterContract)}


def writers_of(kernels: Mapping[str, Contract]) -> dict[str, WriterContract]:
    """The writers that `kernels` know, by name."""
    return {writer.name: writer for contract in kernels.values() for writer in contract.writers}


def _by_name(folders: Iterable[Path]) -> dict[str, AnyContract]:
    found: dict[str, AnyContract] = {}
    for contract in _contracts(folders):
        if contract.name in found:
            raise KernelNotFound(
                f"kernel '{contract.name}' is declared twice: {_origin(found[contract.name])} and {_origin(contract)}"
            )
        found[contract.name] = contract
    return found


def _contracts(folders: Iterable[Path]) -> Iterable[AnyContract]:
    given = {folder.resolve(): folder for folder in reversed((IN_TREE, *folders))}  # one that is named twice: once
    for folder in reversed(given.values()):
        families = sorted(path.parent for path in folder.glob("*/contract.py"))
        if not families and folder != IN_TREE:  # absent where attnreg was installed without its checkout
            raise KernelNotFound(f"{folder}: no kernels here (expected {folder.name}/<family>/contract.py)")
        for family in families:
            yield from _declared(family, f"{_package(folder)}.{family.name}.contract")
    for point in entry_points(group=ENTRY_POINT_GROUP):
        yield from point.load()


def _declared(family: Path, module_name: str) -> Iterable[AnyContract]:
    """The contracts of one family. Raises KernelNotFound, in one line, for whatever is wrong in its contract.py."""
    path = family / "contract.py"
    try:
        found = getattr(importlib.import_module(module_name), "KERNELS", None)
    except Exception as error:  # a contract is code: whatever is wrong in it is one message
        own = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == path.resolve()]
        line = error.lineno if isinstance(error, SyntaxError) else own[-1] if own else 1
        raise KernelNotFound(f"{path}:{line}: {_told(error)}") from error
    if not isinstance(found, tuple | list) or not all(isinstance(one, AnyContract) for one in found):
        said = "there is none" if found is None else f"not {found!r:.60}"
        raise KernelNotFound(f"{path}: KERNELS is a tuple of contracts, {said}")
    return [replace(contract, folder=family) for contract in found]


def _package(folder: Path) -> str:
    """Name of the private package whose search path is `folder`, created on first use."""
    folder = folder.resolve()
    name = _PACKAGE if folder == IN_TREE else f"{_PACKAGE}_{abs(hash(str(folder))):x}"
    if name not in sys.modules:
        package = ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    return name


def _told(error: BaseException) -> str:
    """What an import raised, without the names of our private packages."""
    return f"{type(error).__name__}: {re.sub(_PACKAGE + r'(_[0-9a-f]+)?[.]', '', str(error))}"


def _origin(contract: AnyContract) -> str:
    return str(contract.folder) if contract.folder else f"entry point {contract.entry}"


def get(kernels: Mapping[str, Contract], name: str) -> Contract:
    """The contract called `name`; KernelNotFound suggests the nearest name."""
    try:
        return kernels[name]
    except KeyError:
        near = difflib.get_close_matches(name, kernels, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise KernelNotFound(f"unknown kernel '{name}'.{hint} Known: {', '.join(sorted(kernels))}") from None


def code_home(contract: AnyContract) -> Path | None:
    """Where the kernel's own code lies: the folder of kernels it was found in, or the package or file of its entry."""
    if contract.folder is not None:
        return contract.folder.parent.resolve()
    spec = importlib.util.find_spec(contract.entry.partition(":")[0].partition(".")[0])
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent if spec.submodule_search_locations else Path(spec.origin)


@overload
def load_entry(contract: Contract) -> Launcher: ...


@overload
def load_entry(contract: WriterContract) -> WriterLauncher: ...


def load_entry(contract: AnyContract) -> Launcher | WriterLauncher:
    """Import the implementation of a kernel and return its adapter.

    Raises KernelNotFound where a needed package is not installed (with the line that says what to install) or the
    entry names nothing, KernelRaised where its code cannot be imported or leaves another torch behind.
    """
    missing = [name for name in contract.needs if importlib.util.find_spec(name) is None]
    if missing:
        raise KernelNotFound(
            f"kernel '{contract.name}' needs {', '.join(missing)}. {contract.install_hint or 'Install it first.'}"
        )
    where, _, function = contract.entry.partition(":")
    if contract.folder is not None:
        where = f"{_package(contract.folder.parent)}.{contract.folder.name}.{where.removesuffix('.py')}"
    try:
        module, changed = _imported(where)
    except (AttnregError, KeyboardInterrupt):
        raise
    except BaseException as error:  # importing a kernel runs its code: what it raises is the kernel's failure
        raise KernelRaised(f"'{contract.entry}' cannot be imported: {_told(error)}") from error
    if changed:
        raise KernelRaised(f"importing '{contract.entry}' changed torch's {changed[0]} and left it so")
    launcher = getattr(module, function, None)
    if not callable(launcher):
        near = difflib.get_close_matches(
            function, [name for name, value in vars(module).items() if callable(value)], n=1
        )
        hint = f". Did you mean '{near[0]}'?" if near else ""
        raise KernelNotFound(f"kernel '{contract.name}': '{contract.entry}' is not a function{hint}")
    return launcher  # type: ignore[no-any-return]


def _imported(where: str) -> tuple[ModuleType, tuple[str, ...]]:
    """The module, and what importing it changed of torch, which is put back.

    A module is imported once and its changes count against every case, so the module keeps them.
    """
    from harness.kernel.torch_state import kept_torch_state  # imports torch, which listing kernels does without

    with kept_torch_state() as changed:
        module = importlib.import_module(where)
    return module, vars(module).setdefault(_CHANGED, tuple(changed))
