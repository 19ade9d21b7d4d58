"""What a run ran on: versions, device, commit. Invariant: asking costs no import of torch and opens no device.

The run's controller writes the header, and a controller that opened a device context would hold device memory and
could die with it; so versions come from package metadata and device facts from the driver's own command.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]


def environment() -> dict[str, str | int | None]:
    """Plain data; None where a fact is not to be had on this machine."""
    device, driver = _device_and_driver()
    return {
        "python": platform.python_version(),
        "torch": _version("torch"),
        "triton": _version("triton"),
        "platform": platform.platform(),
        "device": device,
        "driver": driver,
        "cpu_count": os.cpu_count(),
        "commit": _commit(PROJECT),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _device_and_driver() -> tuple[str | None, str | None]:
    listed = _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    if not listed:
        return None, None
    rows = [tuple(part.strip() for part in line.rsplit(",", 1)) for line in listed.splitlines()]
    names = list(dict.fromkeys(row[0] for row in rows))
    return f"{len(rows)} x {', '.join(names)}" if len(rows) > 1 else names[0], rows[0][-1]


def _commit(folder: Path) -> str | None:
    """Commit of the checkout at `folder`, "-dirty" where files were changed; None outside a checkout of ours."""
    if _output("git", "-C", str(folder), "rev-parse", "--show-toplevel") != str(folder):
        return None  # installed somewhere inside another project's repository
    return _output("git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude", "*")


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
