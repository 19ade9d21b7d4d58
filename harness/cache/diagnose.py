"""What a wrong slot of a cache holds, in words: poison, zero, another token, the other tensor, an unscaled value.

Invariant: words only; that the slot is wrong is already known.
"""

from __future__ import annotations

import math

import torch

from harness.cache.build import KVCache
from harness.cache.poison import is_poison
from harness.cache.quantise import bits_of, quantise
from harness.dtypes import element_type
from harness.problem.problem import Problem


def describe_value(element: torch.Tensor) -> str:
    """One element of a cache, or of new tokens, in words; any NaN is poison."""
    value = float(element)
    return "poison" if math.isnan(value) or bool(is_poison(element)) else f"{value:g}"


def describe_slot(
    problem: Problem, cache: KVCache, which: str, seq: int, pos: int, demanded: int, found: torch.Tensor
) -> str:
    """What the slot of (`seq`, `pos`) holds, given its payload `found` [heads, dim]; `demanded` tokens belong there."""
    bits = bits_of(found)
    own, other = (cache.key_payload, cache.value_payload) if which == "k" else (cache.value_payload, cache.key_payload)
    values, other_name = (problem.k, "v") if which == "k" else (problem.v, "k")
    key = problem.key_start[seq] + pos
    if bool(is_poison(found).all()):
        return f"position {pos} is poison"
    if not bool(bits.any()):
        return f"position {pos} is zero"
    if pos < demanded and bool(
        (bits_of(quantise(values[key], 1.0, element_type(problem.case.stored_dtype))) == bits).all()
    ):
        return f"position {pos} holds its value without the descale"
    for payload, name in ((own, ""), (other, f"{other_name} of ")):
        if (at := find_token(problem, payload, bits)) is not None:
            return f"position {pos} holds {name}the token of sequence {at[0]}, position {at[1]}"
    if pos >= demanded:
        return f"position {pos}, which nothing may be read from, holds {describe_value(found.flatten()[0])}"
    wrong = bits != bits_of(own)[key]
    head, dim = wrong.nonzero()[0].tolist()
    got, want = describe_value(found[head, dim]), float(own[key, head, dim])
    return f"position {pos}, head {head}, dim {dim} holds {got} instead of {want:g}"


def find_token(problem: Problem, payload: torch.Tensor, bits: torch.Tensor) -> tuple[int, int] | None:
    """Sequence and position of the first token whose payload [num_keys, heads, dim] has these `bits` [heads, dim]."""
    if payload.shape[1:] != bits.shape:
        return None
    same = (bits_of(payload) == bits).flatten(1).all(dim=1).nonzero()
    if not len(same):
        return None
    return problem.place_of(int(same[0]))
