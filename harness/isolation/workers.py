"""Where cases run: in worker processes of pytest-xdist, one of them where -n says nothing, so that a kernel that ends
its process costs its own case only.

Invariant: a session without matrices is left as it is; one with them either has workers that are replaced when they
die, or says in its header that it has none, and why.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from harness.errors import UsageError
from harness.isolation.devices import cuda_devices, hip_devices, worker_environment
from harness.items import has_matrix

LOSING = ("loadscope", "loadfile", "loadgroup", "each")  # --dist modes that lose cases when a worker dies
SHOWING = ("collectonly", "cacheshow", "showfixtures", "show_fixtures_per_test")  # options with which nothing runs
UNLIMITED = "1000000"  # --max-worker-restart: how many cases crash is not for it to say


def set_up_workers(config: pytest.Config) -> str:
    """Give a session that runs matrices its workers; says for the header what was done, "" where there was nothing.

    To be called in the controller, before pytest-xdist is configured. Raises UsageError for a --dist mode that cannot
    survive the death of a worker.
    """
    if any(config.getoption(option, None) for option in SHOWING) or not runs_matrices(config):
        return ""
    why_not = _in_process(config)
    if why_not:
        return f"cases run in this process ({why_not}): one that ends it ends the session"
    dist = config.getoption("dist")
    if dist in LOSING:
        raise UsageError(
            f"--dist {dist}: pytest-xdist loses cases or hangs in this mode when a worker dies; use load or worksteal"
        )
    option = config.option
    if not option.tx:
        option.numprocesses, option.dist, option.tx = 1, "load" if dist == "no" else dist, ["popen"]
    if option.maxworkerrestart is None:
        option.maxworkerrestart = UNLIMITED
    if config.getoption("--device") != "cpu":
        cuda, hip = cuda_devices(os.environ), hip_devices(os.environ)
        option.tx = [with_environment(spec, worker_environment(i, cuda, hip)) for i, spec in enumerate(option.tx)]
    amount = len(option.tx)
    return (
        f"cases run in {amount} worker process{'es' if amount > 1 else ''}, replaced when one ends (-n 0: in this one)"
    )


def _in_process(config: pytest.Config) -> str:
    """Why this session has no workers; "" where it may have some."""
    if not config.pluginmanager.hasplugin("xdist"):
        return "no pytest-xdist"
    if config.getoption("numprocesses") == 0:
        return "-n 0"
    if config.getoption("--sanitize"):
        return "--sanitize"
    if not config.getoption("tx"):
        for option, value, name in (("usepdb", True, "--pdb"), ("trace", True, "--trace"), ("capture", "no", "-s")):
            if config.getoption(option, None) == value:
                return name
    return ""


def with_environment(spec: str, environment: Mapping[str, str]) -> str:
    """The specification of a worker with variables of its own; pytest-xdist copies it when it replaces the worker.

    Workers on other machines stay as they are.
    """
    return "//".join([spec, *(f"env:{name}={value}" for name, value in environment.items() if spec == "popen")])


def runs_matrices(config: pytest.Config) -> bool:
    """Whether a matrix is among or below the paths that this session was given; nothing is collected for that."""
    pruned = config.getini("norecursedirs")
    return any(
        has_matrix(path)
        for arg in config.args
        for path in _yaml_files(config.invocation_params.dir / arg.partition("::")[0], pruned)
    )


def _yaml_files(path: Path, pruned: list[str]) -> Iterator[Path]:
    if path.is_file():
        yield path
    for folder, folders, files in os.walk(path):
        folders[:] = [name for name in folders if not any(fnmatch.fnmatch(name, pattern) for pattern in pruned)]
        yield from (Path(folder) / name for name in files)
