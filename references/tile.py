"""One tile of the reference: some query rows of one sequence against all keys that they see.

Invariant: a tile writes its own rows and heads of the result and nothing else, so tiles may come in any order and size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from references.quantities import AttentionInputs, AttentionReference


@dataclass(frozen=True)
class SequenceKeys:
    """Keys and values of one sequence, float64, heads first."""

    k: torch.Tensor  # [num_kv_heads, head_size, seq_len]
    v: torch.Tensor  # [num_kv_heads, seq_len, 2 * head_size_v]: v, then |v|
    v_square: torch.Tensor  # [num_kv_heads, seq_len, head_size_v]


@dataclass(frozen=True)
class Tile:
    """Some query rows of one sequence, all query heads of some kv heads, all keys these rows see.

    Scores are [num_kv_heads, num_rows * gqa_ratio, num_keys]: the queries of a group share a product with K.
    """

    inputs: AttentionInputs
    result: AttentionReference
    tokens: slice
    kv_heads: slice
    positions: range
    span: slice

    @property
    def group(self) -> int:
        return self.inputs.q.shape[1] // self.inputs.k.shape[1]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(kv heads, rows, gqa_ratio, anything): a view of a tensor with the first three folded or not."""
        return self.kv_heads.stop - self.kv_heads.start, len(self.positions), self.group, -1

    def run(self, sequence: SequenceKeys) -> None:
        """Compute the tile and write it into the result."""
        k = sequence.k[self.kv_heads, :, self.span]
        v = sequence.v[self.kv_heads, self.span]
        v_square = sequence.v_square[self.kv_heads, self.span]
        x, total, top = self._weights(k)
        lse = top + total.log()
        self._store("lse", lse)
        size = v.shape[2] // 2
        products = x @ v
        self._store("out", products[..., :size] / total)
        self._store("abs_pv", products[..., size:] / total)
        del products
        self._store_offset(x, total, lse)
        self._store_cast(x, total, v[..., size:], v_square)

    def _weights(self, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [kv heads, rows * gqa_ratio, keys]; l and m [kv heads, rows * gqa_ratio, 1]."""
        inputs = self.inputs
        kv_heads, num_rows, group, _ = self.shape
        q = inputs.q[self.tokens, self._q_heads].double() * inputs.softmax_scale  # [rows, q heads, head_size]
        x = q.view(num_rows, kv_heads, group, -1).transpose(0, 1).reshape(kv_heads, num_rows * group, -1) @ k
        del q
        if inputs.logits_soft_cap:
            x.div_(inputs.logits_soft_cap).tanh_().mul_(inputs.logits_soft_cap)
        if inputs.alibi_slopes is not None:
            slopes = self._of_heads(inputs.alibi_slopes).view(kv_heads, 1, group, 1)
            x.view(self.shape).addcmul_(slopes, self._distance()[None, :, None].double())
        if not self._all_visible():
            x.view(self.shape).masked_fill_(self._hidden()[None, :, None], float("-inf"))
        top = x.amax(-1, keepdim=True)
        if inputs.sinks is not None:
            sinks = self._sinks()
            top = torch.maximum(top, sinks)
        total = x.sub_(top).exp_().sum(-1, keepdim=True)
        if inputs.sinks is not None:
            total += (sinks - top).exp_()
        return x, total, top

    def _store_offset(self, x: torch.Tensor, total: torch.Tensor, lse: torch.Tensor) -> None:
        """sum p_j |slope (j - t)|, by Cauchy-Schwarz from the second moment of the key positions."""
        inputs = self.inputs
        offset = torch.zeros_like(lse)
        if inputs.alibi_slopes is not None:
            kv_heads, num_rows, group, _ = self.shape
            query = torch.arange(self.positions.start, self.positions.stop, device=x.device).view(1, num_rows, 1, 1)
            query = query.double() - self.span.start
            key = torch.arange(self.span.stop - self.span.start, device=x.device).double()
            powers = torch.stack((torch.ones_like(key), key, key * key), dim=-1)  # [keys, 3]
            moments = ((x @ powers) / total).view(self.shape)
            mass, first, second = moments[..., 0:1], moments[..., 1:2], moments[..., 2:3]
            distance_square = second - 2 * query * first + query * query * mass
            slopes = self._of_heads(inputs.alibi_slopes).abs().view(kv_heads, 1, group, 1)
            offset += (slopes * (distance_square * mass).clamp_(min=0).sqrt_()).view_as(offset)
        if inputs.sinks is not None:
            sinks = self._sinks()
            offset += (sinks - lse).exp_() * sinks.abs()
        self._store("offset", offset)
        self._store_visible()

    def _store_cast(self, x: torch.Tensor, total: torch.Tensor, abs_v: torch.Tensor, v_square: torch.Tensor) -> None:
        """Moments of the half ulps A_j; overwrites x."""
        rounding = self.result.rounding
        if rounding.half_subnormal == 0:
            half_ulp = x.mul_(rounding.unit_roundoff)
        else:
            flushed = x < 2 * rounding.half_subnormal
            half_ulp = (x * rounding.unit_roundoff).clamp_(min=rounding.half_subnormal).masked_fill_(flushed, 0)
            x.clamp_(max=rounding.half_subnormal).masked_fill_(flushed.logical_not_(), 0)
            del flushed
            self._store("cast_sum", (half_ulp @ abs_v).div_(total))
            self._store("flush_sum", (x @ abs_v).div_(total))
            if rounding.row_sums:
                self._store("row_flush_sum", x.sum(-1, keepdim=True) / total)
        if rounding.row_sums:
            self._store("row_cast_sum", half_ulp.sum(-1, keepdim=True) / total)
        half_ulp.square_()
        self._store("cast_square", (half_ulp @ v_square).div_(total * total))
        if rounding.row_sums:
            self._store("row_cast_square", half_ulp.sum(-1, keepdim=True) / (total * total))

    def _store_visible(self) -> None:
        if self.kv_heads.start == 0:
            hidden = 0 if self._all_visible() else self._hidden().sum(-1)
            self.result.num_visible[self.tokens] = (self.span.stop - self.span.start) - hidden

    def _store(self, name: str, values: torch.Tensor) -> None:
        """Write [kv heads, rows * gqa_ratio, n] to the tensor of the result called `name`."""
        whole: torch.Tensor = getattr(self.result, name)  # [num_tokens, num_q_heads, n] or [num_tokens, num_q_heads]
        by_kv_head = whole.view(whole.shape[0], -1, self.group, values.shape[-1])
        by_kv_head[self.tokens, self.kv_heads] = values.view(self.shape).transpose(0, 1)

    def _distance(self) -> torch.Tensor:
        """Key position minus query position [rows, keys]."""
        query = torch.arange(self.positions.start, self.positions.stop, device=self.inputs.q.device)
        return torch.arange(self.span.start, self.span.stop, device=self.inputs.q.device) - query[:, None]

    def _all_visible(self) -> bool:
        """Whether every row of the tile sees every key of the span."""
        inputs = self.inputs
        inside_window = inputs.sliding_window is None or self.positions[-1] - self.span.start < inputs.sliding_window
        return inside_window and (not inputs.causal or self.span.stop <= self.positions[0] + 1)

    def _hidden(self) -> torch.Tensor:
        """bool [rows, keys]: what a row does not see."""
        distance = self._distance()
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if self.inputs.causal:
            hidden |= distance > 0
        if self.inputs.sliding_window is not None:
            hidden |= -distance >= self.inputs.sliding_window
        return hidden

    @property
    def _q_heads(self) -> slice:
        return slice(self.kv_heads.start * self.group, self.kv_heads.stop * self.group)

    def _of_heads(self, per_head: torch.Tensor) -> torch.Tensor:
        return per_head[self._q_heads].double()

    def _sinks(self) -> torch.Tensor:
        """[kv heads, rows * gqa_ratio, 1]"""
        assert self.inputs.sinks is not None
        kv_heads, num_rows, group, _ = self.shape
        sinks = self._of_heads(self.inputs.sinks).view(kv_heads, 1, group)
        return sinks.expand(kv_heads, num_rows, group).reshape(kv_heads, num_rows * group, 1)
