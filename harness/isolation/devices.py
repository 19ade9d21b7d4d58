"""Which GPU a worker sees, decided before any process of it imports torch.

Invariant: worker i sees device i modulo their number, and whoever replaces it sees the same; on a machine of one device
or none nothing is set at all.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

CUDA, HIP = "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"
_KFD = Path("/sys/class/kfd/kfd/topology/nodes")


def worker_environment(worker: int, cuda: list[str], hip: list[str]) -> dict[str, str]:
    """The variables that show worker number `worker` one of the devices."""
    chosen = {}
    for variable, devices in ((CUDA, cuda), (HIP, hip)):
        if len(devices) > 1:
            chosen[variable] = devices[worker % len(devices)]
    return chosen


def cuda_devices(environment: Mapping[str, str]) -> list[str]:
    """Names by which CUDA_VISIBLE_DEVICES selects what this process may see; torch is not asked, as it would have to be
    imported."""
    if CUDA in environment:
        return _listed(environment[CUDA])
    return [str(i) for i in range(sum(line.startswith("GPU ") for line in _nvidia_smi().splitlines()))]


def hip_devices(environment: Mapping[str, str], nodes: Path = _KFD) -> list[str]:
    """The same for HIP_VISIBLE_DEVICES; GPUs are the nodes of the driver's topology that have SIMD units."""
    if HIP in environment:
        return _listed(environment[HIP])
    gpus = 0
    for node in nodes.glob("*/properties"):
        facts = dict(line.split(None, 1) for line in node.read_text(encoding="ascii").splitlines() if " " in line)
        gpus += facts.get("simd_count", "0").strip() != "0"
    return [str(i) for i in range(gpus)]


def _listed(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _nvidia_smi() -> str:
    if shutil.which("nvidia-smi") is None:
        return ""
    try:
        done = subprocess.run(("nvidia-smi", "-L"), capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
