"""An honest kernel whose import changes what is not its own."""

from __future__ import annotations

import torch

from .toy import honest

torch.use_deterministic_algorithms(True)

__all__ = ["honest"]
