"""Numerics profile: the roundings a kernel declares, from which its tolerance follows.

Invariant: a field either names a pure function of the inputs, which the reference repeats (harness.oracle.emulate) and
which costs no tolerance, or a rounding whose effect depends on the order of the work, which enters the tolerance.
A declaration is checked by the runs themselves: too tight a profile fails, too loose a one has no power
(harness.store.tightness). Free of torch, because contracts are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from harness.dtypes import element_type

TIGHTER_P = ("fp8_e5m2", "fp8_e4m3", "bf16", "fp16", "fp32")  # each step rounds P more finely


@dataclass(frozen=True)
class PerKey:
    """One choice for keys that the cache held at launch, one for tokens that arrive as new."""

    cached: str
    new: str


@dataclass(frozen=True)
class Prescale:
    """One step of scaling q before the product with K: the result is rounded to the query dtype."""

    factor: str  # softmax_scale | log2e
    constant: str = "fp32"  # element type that the factor itself is rounded to first; "q" the query dtype


@dataclass(frozen=True)
class NumericsProfile:
    """Fields name element types of harness.dtypes; "q" means the dtype of the query of the case at hand.

    Raises ValueError for a word that is not among those named here.
    """

    # Emulated in the reference: they cost no tolerance.
    kv_dequant: str = "round_to_q"  # exact: payload * descale in float32 | round_to_q: then rounded to the query dtype
    q_prescale: tuple[Prescale, ...] = ()  # steps applied to q, each rounded; () where the logits are scaled in float32
    q_round: str | PerKey = "q"  # what q is rounded to before the product with K; 8 bits saturate
    in32: str = "exact"  # operands of float32 products: exact | tf32_rz (truncated) | tf32_rna (to nearest)

    # Depend on the order of the work: they enter the tolerance.
    dot_reduce: str = "fp32"  # what q . k is multiplied and summed in
    s_dtype: str = "fp32"  # what the scaled logits are rounded to
    p_dtype: str | PerKey = "q"  # what softmax probabilities are rounded to before the product with V
    p_scale: float = 1.0  # factor applied to P before that rounding
    p_fold_v: bool = False  # whether the V descale of a key is multiplied into P before that rounding
    sum_after_cast: bool = False  # whether the row sum adds rounded probabilities
    mma: str = "wgmma"  # simt | mma_sync | wgmma: which units accumulate; matrix units truncate on some GPUs
    mma_k: int | None = None  # products summed per matrix instruction; None: what the operands' dtype implies
    acc_bits: int | None = None  # bits an accumulator keeps; None: 24, but 13 in 8-bit products of warp groups
    promote_every: int | None = None  # keys after which such an accumulator is added to a float32 one; None: never
    split_partial_dtype: str = "fp32"  # what split-KV partial outputs are stored in
    out_dtype: str = "q"
    out_scale: float = 1.0

    lse_base: str = "e"  # e | 2
    lse_from: str = "kernel"  # kernel | workspace: the adapter makes it from the maxima and sums of the splits

    def __post_init__(self) -> None:
        words = (
            ("kv_dequant", self.kv_dequant, ("exact", "round_to_q")),
            ("in32", self.in32, ("exact", "tf32_rz", "tf32_rna")),
            ("dot_reduce", self.dot_reduce, ("fp32", "bf16", "fp16")),
            ("mma", self.mma, ("simt", "mma_sync", "wgmma")),
            ("lse_base", self.lse_base, ("e", "2")),
            ("lse_from", self.lse_from, ("kernel", "workspace")),
            *(("q_prescale", step.factor, ("softmax_scale", "log2e")) for step in self.q_prescale),
        )
        for name, word, known in words:
            if word not in known:
                raise ValueError(f"numerics profile: {name} '{word}'; known: {', '.join(known)}")

    def p_type(self, q_dtype: str, cached: bool = True) -> str:
        """Element type of P for keys from the cache, or for new tokens."""
        return _resolved(self.p_dtype, q_dtype, cached)

    def q_type(self, q_dtype: str, cached: bool = True) -> str:
        """Element type that q is rounded to for keys from the cache, or for new tokens."""
        return _resolved(self.q_round, q_dtype, cached)

    def out_type(self, q_dtype: str) -> str:
        return q_dtype if self.out_dtype == "q" else self.out_dtype

    def tf32(self, q_dtype: str) -> str | None:
        """tf32_rz | tf32_rna where the operands of this kernel's products are cut to TF32, else None."""
        return self.in32 if q_dtype == "fp32" and self.in32 != "exact" else None


# For a kernel that declares nothing: what compiled Triton kernels do unless told otherwise. An emulated rounding is no
# slack: if the kernel does not do it, declare that, or honest runs fail.
UNKNOWN = NumericsProfile(kv_dequant="round_to_q", in32="tf32_rz", p_dtype="q", mma="wgmma")


def tighter_p(profile: NumericsProfile, q_dtype: str) -> NumericsProfile | None:
    """`profile` with P rounded one step more finely, or None where P is float32 already.

    A kernel whose errors stay within the tolerance of this one has not shown that it rounds P as it declares.
    """
    if profile.tf32(q_dtype) and profile.p_type(q_dtype) == "fp32":
        return replace(profile, in32="exact")
    cached, new = (_next_finer(profile.p_type(q_dtype, place)) for place in (True, False))
    if cached == profile.p_type(q_dtype, True) and new == profile.p_type(q_dtype, False):
        return None
    return replace(profile, p_dtype=cached if cached == new else PerKey(cached, new))


def cost(profile: NumericsProfile, q_dtype: str = "bf16") -> str:
    """What the loose declarations of `profile` hide from the tolerance, one clause each; "" where it is exact."""
    clauses = []
    finer = tighter_p(profile, q_dtype)
    if profile.tf32(q_dtype):
        clauses.append("P in TF32: faults smaller than 2^-10 of V pass, 8,192 times what float32 would allow")
    elif finer is not None:
        rounded, next_one = profile.p_type(q_dtype), finer.p_type(q_dtype)
        times = element_type(rounded).unit_roundoff / element_type(next_one).unit_roundoff
        clauses.append(f"P in {rounded}: a fault must be {times:,.0f} times as large as with P in {next_one}")
    if profile.sum_after_cast:
        clauses.append("sum after the cast: the LSE takes P's rounding error and no longer shows small K faults")
    if profile.dot_reduce != "fp32":
        clauses.append(f"q . k summed in {profile.dot_reduce}: logit faults drown, out and LSE are barely tested")
    if profile.s_dtype != "fp32":
        clauses.append(f"logits in {profile.s_dtype}: K faults below its rounding pass")
    if profile.split_partial_dtype != "fp32":
        clauses.append(
            f"partials in {profile.split_partial_dtype}: one more rounding of the output, in proportion to |V|"
        )
    if profile.mma == "wgmma" and "fp8" in profile.p_type(q_dtype):
        clauses.append(
            "8-bit warp-group products: accumulators of 13 bits, an allowance in proportion to the number of keys"
        )
    return "; ".join(clauses)


def _resolved(choice: str | PerKey, q_dtype: str, cached: bool) -> str:
    name = choice if isinstance(choice, str) else choice.cached if cached else choice.new
    return q_dtype if name == "q" else name


def _next_finer(p_type: str) -> str:
    return TIGHTER_P[min(TIGHTER_P.index(p_type) + 1, len(TIGHTER_P) - 1)]
