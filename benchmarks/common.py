"""What every command under benchmarks/ shares: --quick, --json FILE, and a line about the machine."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))


def parser(about: str) -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=about)
    result.add_argument(
        "--quick", action="store_true", help="a small version that ends in seconds, to see that it runs"
    )
    result.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE as well")
    return result


def machine() -> dict[str, Any]:
    """Facts a figure is worthless without."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {os.cpu_count()} cores",
    }


def finish(figures: dict[str, Any], path: Path | None) -> None:
    """Write `figures`, with the machine they were measured on, where --json says."""
    if path is not None:
        path.write_text(json.dumps({"machine": machine(), **figures}, indent=2) + "\n", encoding="utf-8")
