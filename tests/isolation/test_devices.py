"""Which GPU a worker sees: its number modulo their count, its replacement the same, and nothing set for one device."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from harness.isolation.devices import cuda_devices, hip_devices, worker_environment
from harness.isolation.workers import with_environment

SMI = """#!/bin/sh
echo 'GPU 0: H (UUID: GPU-a)'
echo '  MIG 1g.10gb Device 0: (UUID: MIG-b)'
echo 'GPU 1: H (UUID: GPU-c)'
"""


def test_workers_take_turns() -> None:
    seen = [worker_environment(i, ["0", "1", "2"], []) for i in range(5)]
    assert [one["CUDA_VISIBLE_DEVICES"] for one in seen] == ["0", "1", "2", "0", "1"]
    assert worker_environment(3, [], ["4", "6"]) == {"HIP_VISIBLE_DEVICES": "6"}
    assert worker_environment(3, ["0"], []) == {}


def test_what_the_user_made_visible_is_what_is_shared() -> None:
    assert cuda_devices({"CUDA_VISIBLE_DEVICES": "2, GPU-x"}) == ["2", "GPU-x"]
    assert cuda_devices({"CUDA_VISIBLE_DEVICES": ""}) == []
    assert hip_devices({"HIP_VISIBLE_DEVICES": "1,0"}) == ["1", "0"]


def test_cuda_devices_are_counted_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(SMI)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert cuda_devices({}) == ["0", "1"]
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert cuda_devices({}) == []


def test_hip_devices_are_the_nodes_with_simd_units(tmp_path: Path) -> None:
    for name, simds in (("0", 0), ("1", 304), ("2", 304)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "properties").write_text(f"cpu_cores_count {0 if simds else 64}\nsimd_count {simds}\n")
    assert hip_devices({}, tmp_path) == ["0", "1"]
    assert hip_devices({}, tmp_path / "none") == []


def test_only_local_workers_are_given_a_device() -> None:
    chosen = {"CUDA_VISIBLE_DEVICES": "1"}
    assert with_environment("popen", chosen) == "popen//env:CUDA_VISIBLE_DEVICES=1"
    assert with_environment("ssh=there", chosen) == "ssh=there"
    assert with_environment("popen", {}) == "popen"
