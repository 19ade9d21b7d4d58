"""Findings: what the oracle saw, element by element, before anybody calls it a fault.

Invariant: findings hold numbers and masks only; words, causes and outcomes are made from them later.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from harness.oracle.gains import GainFindings, HullFindings

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Worst:
    """The element with the largest error in units of its tolerance."""

    token: int
    head: int
    dim: int  # -1 for an LSE, which has no dims
    got: float
    want: float
    tolerance: float
    ratio: float


@dataclass(frozen=True)
class TensorFindings:
    """One output tensor against the reference."""

    name: str  # out | lse
    err_over_tol: float  # worst error in units of tolerance; inf where non-finite and the reference is finite
    mismatched: (
        torch.Tensor
    )  # bool on the CPU; out: [num_tokens, num_q_heads, head_size_v], lse: [num_tokens, num_q_heads]
    num_mismatched: int
    num_elements: int
    num_nan: int
    num_inf: int  # infinite where the reference is finite
    num_unwritten: int  # elements that still hold the poison they were handed out with
    worst: Worst | None  # None where nothing was compared
    num_zero: int = 0  # mismatched elements that are exactly 0


@dataclass(frozen=True)
class AccessFinding:
    """Memory that programs had to read and did not, or read and had not to: one example, and how many are like it.

    Positions are those of the sequence (k_cache, v_cache, k, v), pages of the sequence (kv_block_descale) or columns
    (block_table); where there is no sequence, none. kind: never_read | behind_end | out_of_window | other_head |
    other_sequence | not_handed_over | unused_page | gap | packed | never_stored.
    """

    kind: str
    buffers: tuple[str, ...]
    sequence: int | None
    kv_head: int | None
    first: int  # position
    last: int
    count: int  # positions between first and last that it is about
    page: int | None  # physical page of the first position
    slot: int | None
    tokens: tuple[int, ...]  # first and last output row concerned, among those that the program serves
    kernel: str
    program: tuple[int, int, int] | None
    where: str  # file:line of the load, or of a load of the same buffer by this program where one is missing
    dims: tuple[int, ...] = ()  # of the first position, where it is about some of its dims only
    others: int = 0  # further (program, sequence, kv head) with this finding at this line


@dataclass(frozen=True)
class AccessFindings:
    """What the trace shows. `state` says what was judged: "traced", or why not everything was."""

    state: str = ""
    found: tuple[AccessFinding, ...] = ()


@dataclass(frozen=True)
class Findings:
    tensors: tuple[TensorFindings, ...]
    violations: tuple[str, ...] = ()  # exact invariants broken: inputs changed, red zone written, no kernel ran, ...
    gains: GainFindings = field(default_factory=GainFindings)  # tier 2, and where an error that is there comes from
    hull: HullFindings = field(default_factory=HullFindings)
    access: AccessFindings = field(default_factory=AccessFindings)

    @property
    def clean(self) -> bool:
        """Nothing exceeds any tier of the tolerance, nothing is outside its exact bounds, all accesses are right."""
        wrong = any(t.num_mismatched for t in self.tensors) or self.hull.num_outside or self.gains.num_gains
        return not self.violations and not self.access.found and not wrong

    @property
    def err_over_tol(self) -> float:
        return max((t.err_over_tol for t in self.tensors), default=0.0)
