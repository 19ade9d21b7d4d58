"""Kernels found by folder or entry point and loaded by path, never imported by name.

Invariant: every folder of kernels becomes a private package (a public package already owns `import kernels`); contracts
are loaded when kernels are listed, implementations (and torch, triton) only when a kernel is launched.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

from harness.errors import AttnregError, KernelNotFound, KernelRaised
from harness.kernel.arguments import LaunchArguments
from harness.kernel.contract import Contract

IN_TREE = Path(__file__).resolve().parents[2] / "kernels"
ENTRY_POINT_GROUP = "attnreg.kernels"
_PACKAGE = "_attnreg_kernels"

Launcher = Callable[[LaunchArguments], None]


def find_kernels(folders: Iterable[Path] = ()) -> dict[str, Contract]:
    """Contracts by kernel name: the in-tree folders, `folders`, then installed entry points.

    A folder of kernels holds family folders, each with a contract.py that defines KERNELS. An entry point of group
    `attnreg.kernels` names an iterable of contracts whose `entry` is "module:function".
    Raises KernelNotFound for a folder without families, and for a name that is declared twice.
    """
    found: dict[str, Contract] = {}
    for contract in _contracts(folders):
        if contract.name in found:
            raise KernelNotFound(
                f"kernel '{contract.name}' is declared twice: {_origin(found[contract.name])} and {_origin(contract)}"
            )
        found[contract.name] = contract
    return found


def _contracts(folders: Iterable[Path]) -> Iterable[Contract]:
    for folder in (IN_TREE, *folders):
        families = sorted(path.parent for path in folder.glob("*/contract.py"))
        if not families and folder != IN_TREE:  # absent where attnreg was installed without its checkout
            raise KernelNotFound(f"{folder}: no kernels here (expected {folder.name}/<family>/contract.py)")
        for family in families:
            try:
                module = importlib.import_module(f"{_package(folder)}.{family.name}.contract")
                contracts = [replace(contract, folder=family) for contract in module.KERNELS]
            except Exception as error:  # a contract is code: whatever is wrong in it is one message
                what = f"{type(error).__name__}: {error}"
                raise KernelNotFound(f"{family / 'contract.py'}: no KERNELS to be had: {what}") from error
            yield from contracts
    for point in entry_points(group=ENTRY_POINT_GROUP):
        yield from point.load()


def _package(folder: Path) -> str:
    """Name of the private package whose search path is `folder`, created on first use."""
    folder = folder.resolve()
    name = _PACKAGE if folder == IN_TREE else f"{_PACKAGE}_{abs(hash(str(folder))):x}"
    if name not in sys.modules:
        package = ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    return name


def _origin(contract: Contract) -> str:
    return str(contract.folder) if contract.folder else f"entry point {contract.entry}"


def get(kernels: Mapping[str, Contract], name: str) -> Contract:
    """The contract called `name`; KernelNotFound suggests the nearest name."""
    try:
        return kernels[name]
    except KeyError:
        near = difflib.get_close_matches(name, kernels, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise KernelNotFound(f"unknown kernel '{name}'.{hint} Known: {', '.join(sorted(kernels))}") from None


def load_entry(contract: Contract) -> Launcher:
    """Import the implementation of a kernel and return its adapter.

    Raises KernelNotFound where a needed package is not installed (with the line that says what to install) or the
    entry names nothing, KernelRaised where its code cannot be imported.
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
        module = importlib.import_module(where)
    except (AttnregError, KeyboardInterrupt):
        raise
    except BaseException as error:  # importing a kernel runs its code: what it raises is the kernel's failure
        raise KernelRaised(f"'{contract.entry}' cannot be imported: {type(error).__name__}: {error}") from error
    launcher = getattr(module, function, None)
    if not callable(launcher):
        raise KernelNotFound(f"kernel '{contract.name}': '{contract.entry}' is not a function")
    return launcher  # type: ignore[no-any-return]
