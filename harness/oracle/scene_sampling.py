"""Which sequences, rows and heads of a batch are looked at for the effects of faults.

Invariant: a sample can only make a fault look smaller than it is, never larger. It holds, for each place where faults
strike, the head that attends there most: data laws point heads in turn at such places, and heads picked by number alone
may all be in step with the turns and miss one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from harness.case import Case
from harness.oracle.scene import PLACES, Batch, Scene, Scores, seen_at

MAX_ROWS = 32  # of one sequence
MAX_HEADS = 12
MAX_SEQUENCES = 16
MAX_ELEMENTS = 1 << 25  # of a temporary, but for sequences of which a single head has more


def scenes(batch: Batch) -> Iterator[Scene]:
    """Scenes of the sequences of `batch` that have keys, of at most MAX_SEQUENCES spread over their lengths.

    One after the other, so that only one need be in memory; several of one sequence where it is long. One
    synchronisation with the device per sequence that has more than MAX_HEADS query heads.
    """
    inputs = batch.inputs
    starts = [(0, 0)]
    for query_len, seq_len in zip(inputs.query_lens, inputs.seq_lens, strict=True):
        starts.append((starts[-1][0] + query_len, starts[-1][1] + max(seq_len, 0)))
    lens = list(zip(inputs.query_lens, inputs.seq_lens, strict=True))
    with_keys = sorted((seq for seq, (_, n) in enumerate(lens) if n > 0), key=lambda seq: (lens[seq][0] > 1, lens[seq]))
    for seq in _spread(with_keys, MAX_SEQUENCES):
        scene = _scene(batch, seq, *starts[seq])
        heads = _sampled_heads(scene)
        count = _heads_at_once(scene)
        for first in range(0, len(heads), count):
            yield scene.of_heads(heads[first : first + count])


def _scene(batch: Batch, seq: int, first_token: int, first_key: int) -> Scene:
    """The sampled rows of a sequence, of every head."""
    case, inputs = batch.case, batch.inputs
    query_len, seq_len = inputs.query_lens[seq], inputs.seq_lens[seq]
    keys = slice(first_key, first_key + seq_len)
    device = inputs.q.device
    first_pos = seq_len - query_len
    sampled = _sampled_rows(case, first_pos, query_len)
    chosen = torch.tensor(sampled, device=device)  # [rows]
    tokens = first_token + chosen

    def queries(q: torch.Tensor) -> torch.Tensor:
        return q[tokens].double().transpose(0, 1) * inputs.softmax_scale

    return Scene(
        case=case,
        inputs=inputs,
        seq=seq,
        first_key=first_key,
        q=queries(inputs.q),
        q_cached=None if inputs.q_cached is None else queries(inputs.q_cached),
        distance=torch.arange(seq_len, device=device) - (first_pos + chosen)[:, None],
        k=inputs.k[keys],
        v=inputs.v[keys],
        key_payload=batch.key_payload[keys],
        value_payload=batch.value_payload[keys],
        k_descale=_of_keys(batch.k_descale, batch)[keys],
        v_descale=_of_keys(batch.v_descale, batch)[keys],
        q_descale=batch.q_descale,
        output_scale=batch.output_scale,
        q_heads=tuple(range(case.num_q_heads)),
        positions=tuple(first_pos + row for row in sampled),
        tokens=tokens,
        first_pos=first_pos,
        query_len=query_len,
        seq_len=seq_len,
        cached_len=min(batch.cached_lens[seq], seq_len),
    )


def _of_keys(descale: torch.Tensor, batch: Batch) -> torch.Tensor:
    """`descale` by key and KV head: [num_keys, num_kv_heads, 1]"""
    return descale.expand(*batch.key_payload.shape[:2], 1)


def _heads_at_once(scene: Scene) -> int:
    """Query heads whose keys, values and scores stay within MAX_ELEMENTS; at least one."""
    per_key = max(scene.case.head_size, scene.case.value_size, len(scene.positions))
    return max(MAX_ELEMENTS // (scene.seq_len * per_key), 1)


def _sampled_heads(scene: Scene) -> tuple[int, ...]:
    """At most MAX_HEADS query heads: those of the first and last KV head, the one that ALiBi bends least, the loudest.

    Head 1 is one that a mapping by modulo moves, wherever there is anything to map.
    """
    heads, group = scene.case.num_q_heads, scene.case.gqa_ratio
    if heads <= MAX_HEADS:
        return tuple(range(heads))
    wanted = [0, 1, group - 1, heads - group, heads - 1]
    if scene.inputs.alibi_slopes is not None:
        wanted.append(int(scene.inputs.alibi_slopes.argmin()))
    wanted += [*loudest_heads(scene), *_spread(range(heads), MAX_HEADS)]
    return tuple(sorted(list(dict.fromkeys(wanted))[:MAX_HEADS]))


def loudest_heads(scene: Scene) -> list[int]:
    """Of each place where faults strike, the query head that attends there most, in any of the rows of `scene`.

    `scene` holds every query head. In float32: this is a choice, not a result.
    """
    inputs, places = scene.inputs, _places(scene)
    slopes, sinks = (None if x is None else x.float() for x in (inputs.alibi_slopes, inputs.sinks))
    mass = []
    for heads in _chunks(scene):
        scores = Scores(
            dots=_grouped_dots(scene, heads),
            seen=seen_at(scene.distance, inputs.causal, inputs.sliding_window, inputs.sink_tokens),
            distance=scene.distance,
            soft_cap=inputs.logits_soft_cap,
            slopes=None if slopes is None else slopes[heads],
            sinks=None if sinks is None else sinks[heads],
        )
        p, _ = scores.weights
        mass.append(torch.stack([(p * place).sum(-1).amax(-1) for place in places]))
    loudest: list[int] = torch.cat(mass, dim=1).argmax(1).tolist()
    return loudest


def _chunks(scene: Scene) -> Iterator[slice]:
    """All query heads, in slices of whole groups, or of parts of one group, that stay within MAX_ELEMENTS."""
    group, count = scene.case.gqa_ratio, _heads_at_once(scene)
    whole = max(count // group, 1) * group
    for first in range(0, scene.case.num_q_heads, whole):
        stop = min(first + whole, scene.case.num_q_heads)
        step = whole if count >= group else count
        yield from (slice(start, min(start + step, stop)) for start in range(first, stop, step))


def _places(scene: Scene) -> list[torch.Tensor]:
    """bool [rows, keys] each: the newest key, a row's own, those at edges of its mask, and pages that faults strike."""
    key = torch.arange(scene.seq_len, device=scene.distance.device)
    places = [(key == scene.seq_len - 1).expand_as(scene.distance), scene.distance == 0]
    if scene.case.sliding_window is not None:
        places.append(scene.distance == 1 - scene.case.sliding_window)
    if scene.case.sink_tokens:
        places.append((key == scene.case.sink_tokens - 1).expand_as(scene.distance))
    for page in dict.fromkeys(place(scene.cached_pages) for place in PLACES.values() if scene.cached_pages):
        slots = scene.slots(page)
        places.append(((key >= slots.start) & (key < slots.stop)).expand_as(scene.distance))
    return places


def _grouped_dots(scene: Scene, heads: slice) -> torch.Tensor:
    """As Scene.dots, with one product for all heads of a group: float32 [heads, rows, keys]."""
    group = scene.case.gqa_ratio
    kv_heads = slice(heads.start // group, (heads.stop - 1) // group + 1)
    keys = scene.k[:, kv_heads].float().permute(1, 2, 0)  # [kv heads, head_size, keys]

    def dots(q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        own = q[heads].float()  # [heads, rows, head_size]
        product = own.reshape(len(keys), -1, own.shape[-1]) @ keys  # [kv heads, heads of a group * rows, keys]
        return product.view(*own.shape[:2], -1)

    found = dots(scene.q, keys)
    if scene.q_cached is not None:
        cached = slice(0, scene.cached_len)
        found[..., cached] = dots(scene.q_cached, keys[..., cached])
    return found


def _sampled_rows(case: Case, first_pos: int, query_len: int) -> list[int]:
    """Numbers of at most MAX_ROWS rows of a sequence: the first, the newest, and those at edges of pages and window."""
    if query_len <= MAX_ROWS:
        return list(range(query_len))
    positions = range(first_pos, first_pos + query_len)
    page, window = case.page_size, case.sliding_window
    edges = [row for row, pos in enumerate(positions) if pos % page in (0, page - 1)]
    if window is not None:
        behind = window + case.sink_tokens  # the sink tokens have just left the window
        near = {*range(window - 1, window + 2), *range(behind - 1, behind + 2)}
        edges = [row for row, pos in enumerate(positions) if pos in near] + edges
    wanted = [*range(4), *range(query_len - 8, query_len), *_spread(edges, 12), *_spread(list(range(query_len)), 8)]
    return sorted(dict.fromkeys(wanted))


def _spread(items: Sequence[int], count: int) -> list[int]:
    """At most `count` of `items`, evenly spread, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[i * (len(items) - 1) // (count - 1)] for i in range(count)]
