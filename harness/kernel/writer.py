"""WriterContract: what a cache writer accepts and stores; WriterArguments: what it is handed.

Invariant: a writer stores payload = value / descale (one float32 division, rounded to nearest even, the largest number
of the stored type where the value lies beyond) of token i in slot slot_mapping[i], and no other byte: there is no
tolerance, and whatever else it does is a failure. Free of torch, as every contract.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.case import Case
from harness.kernel.clauses import first_clause, wrong_words
from harness.layout import LAYOUTS

if TYPE_CHECKING:
    import torch

FEATURES: dict[str, str] = {
    "head_size_v": "a V head size that differs from K's",
    "strided_cache": "non-contiguous views of the cache",
    "strided_inputs": "non-contiguous k and v",
}


@dataclass(frozen=True)
class WriterContract:
    """Declaration of one writer. `entry` is "file:function" inside its folder, imported at launch only."""

    name: str
    about: str
    entry: str
    features: frozenset[str] = frozenset(FEATURES)
    dtypes: frozenset[str] = frozenset({"fp32", "fp16", "bf16"})
    kv_dtypes: frozenset[str] = frozenset({"auto", "fp8_e4m3", "fp8_e5m2"})
    descales_per: frozenset[str] = frozenset({"tensor"})  # of those it reads
    layouts: frozenset[str] = frozenset(LAYOUTS)
    page_sizes: frozenset[int] | None = None  # None: any
    head_sizes: frozenset[int] | None = None  # None: any
    slot_dtype: str = "int64"
    launches: tuple[str, ...] = ()  # names of the device kernels it launches; () where they cannot be observed
    needs: tuple[str, ...] = ()  # importable modules beyond torch, e.g. ("triton",)
    install_hint: str = ""  # one line: what to install when `needs` is not met
    folder: Path | None = None  # set by the registry

    def __post_init__(self) -> None:
        """ValueError for a word that no matrix has: cases would be UNSUPPORTED for no reason of the writer's."""
        known = {"features": frozenset(FEATURES)}
        if wrong := next(wrong_words(self, known), None):
            raise ValueError(f"contract of {self.name}: {wrong}")

    @property
    def room(self) -> dict[str, int]:
        """Elements behind the end of a buffer that it may read: none."""
        return {}

    def must_launch(self, case: Case) -> frozenset[str]:
        """The device kernels without which nothing was written."""
        return frozenset(self.launches)

    def unsupported(self, case: Case) -> str | None:
        """The clause of this contract that `case` is outside of, or None where the case is admitted."""
        if clause := first_clause(self, case):
            return clause
        wanted = {
            "head_size_v": case.value_size != case.head_size,
            "strided_cache": case.strides != "compact",
            "strided_inputs": case.strides == "all",
        }
        lacking = sorted(name for name, needed in wanted.items() if needed and name not in self.features)
        return f"{lacking[0]} ({FEATURES[lacking[0]]})" if lacking else None


@dataclass(frozen=True)
class WriterArguments:
    """Tensors live on one device. A writer reads these and writes only live slots of `k_cache` and `v_cache`."""

    k: torch.Tensor  # [num_tokens, num_kv_heads, head_size] new tokens, and padding that no slot may hold
    v: torch.Tensor  # [num_tokens, num_kv_heads, head_size_v]
    slot_mapping: torch.Tensor  # [num_tokens] int64: page * page_size + offset; negative: padding, stored nowhere
    k_cache: torch.Tensor  # as in LaunchArguments
    v_cache: torch.Tensor
    layout: str
    k_scale: torch.Tensor  # [1] float32, payload = value / scale; [num_kv_heads] (any stride) by head; NaN otherwise
    v_scale: torch.Tensor
    kv_dtype: str
    kv_block_descale: torch.Tensor | None = None  # [pages, kv_heads, 2] float32, of K then V
    k_token_descale: torch.Tensor | None = None  # [pages, page_size, kv_heads] float32, of every slot in use
    v_token_descale: torch.Tensor | None = None
