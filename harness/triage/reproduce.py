"""The command that runs one case again. Invariant: pasted into a shell it means exactly what it says, and it names
nothing that is the default anyway.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping

DEFAULT_TIER = "smoke"
DEFAULT_SEEDS: Mapping[str, int] = {"data": 0, "geometry": 0}


def reproduce_line(
    matrix_path: str,
    case_id: str,
    tier: str = DEFAULT_TIER,
    seeds: Mapping[str, int] | None = None,
    options: Mapping[str, object] | None = None,
    *,
    default_seeds: Mapping[str, int] = DEFAULT_SEEDS,
    plugin: str = "",
) -> str:
    """e.g. `pytest 'cases/contexted_kv.yaml::<id>' --tier nightly --data-seed 17 --plant drop_newest`.

    options: command-line options by name, with or without dashes. True is a flag; a list or tuple repeats the option;
    None, False and empty ones are left out. default_seeds: the seeds that the case has without being told.
    plugin: what has to be loaded by name.
    """
    words = ["pytest", *(["-p", plugin] if plugin else []), _quoted(f"{matrix_path}::{case_id}")]
    if tier != DEFAULT_TIER:
        words += ["--tier", shlex.quote(tier)]
    for name, seed in (seeds or {}).items():
        if seed != default_seeds.get(name):
            words += [f"--{name}-seed", str(seed)]
    for name, value in (options or {}).items():
        words += _option("--" + name.lstrip("-").replace("_", "-"), value)
    return " ".join(words)


def _option(name: str, value: object) -> list[str]:
    if value is None or value is False or value == "":
        return []
    if value is True:
        return [name]
    if isinstance(value, (list, tuple)):
        return [word for item in value for word in _option(name, item)]
    text = str(value)
    return [f"{name}={shlex.quote(text)}"] if text.startswith("-") else [name, shlex.quote(text)]


def _quoted(text: str) -> str:
    """Always in quotes: brackets, stars and tildes of an id must reach pytest as they are."""
    quoted = shlex.quote(text)
    return quoted if quoted != text else f"'{text}'"
