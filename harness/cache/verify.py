"""The cache proves itself: every slot of every page is read back before a kernel sees it.

Invariant: nothing here uses the builder's views. Addresses follow from the layout's table, the strides of the tensors
and the page table, in int64, as a kernel computes them. What is verified: the cache holds exactly the tokens that the
content class demands, bit for bit; every other element of the storage, stride gaps and dead pages included, is poison;
every other page has the descales its payload was made with; new tokens are handed over where, and only where, the
contract takes them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from harness.cache.address import Address, address
from harness.cache.build import KVCache
from harness.cache.content import Content, is_decode, phase
from harness.cache.dead import Dead
from harness.cache.diagnose import describe_slot, describe_value
from harness.cache.page_table import page_ids, table_name
from harness.cache.poison import is_poison, poison_bits, tail_bits
from harness.cache.probe import storage_bits
from harness.cache.quantise import bits_of
from harness.cache.table_probe import shared_is_poison
from harness.cache.verify_descale import verify_descales
from harness.cache.window import dead_columns, dead_pages
from harness.dtypes import element_type
from harness.errors import SetupBug
from harness.problem.problem import Problem

_CHUNK = 1 << 22  # elements at a time


def verify_cache(problem: Problem, cache: KVCache, content: Content, window_pages: str = "live") -> None:
    """Raise SetupBug for the first thing in `cache` that a kernel of class `content` must not be handed.

    window_pages: what its contract says of pages that left the window.
    """
    dead = _dead_pages(problem, cache, content, window_pages)
    for which in ("k", "v"):
        verify_payload(problem, cache, which)
        _verify_pool(problem, cache, content, dead, which)
        _verify_new_tokens(problem, cache, content, which)
    verify_descales(problem, cache, content, dead)
    if "table" in cache.pools and not shared_is_poison(cache.pools["table"]):
        raise SetupBug(table_name(cache), "poison in the memory that all unused addresses share", "something else")


def _dead_pages(problem: Problem, cache: KVCache, content: Content, window_pages: str) -> frozenset[int]:
    """Pages that must be poison although the page table names them for tokens."""
    case = problem.case
    counts = [-(-max(seq_len, 0) // case.page_size) for seq_len in case.rows.seq_lens]
    pages = [page_ids(cache, seq, count).tolist() for seq, count in enumerate(counts)]
    return dead_pages(dead_columns(case, content, window_pages), pages)


def verify_payload(problem: Problem, cache: KVCache, which: str) -> None:
    """Payloads are their values: the same bits without quantisation, else within half a step of the stored type."""
    case, stored = problem.case, element_type(problem.case.stored_dtype)
    values, payload = _of(problem, cache, which)
    descale = problem.descale(which).to(torch.float64)  # [1, 1, 1], [1, heads, 1] or [num_keys, heads, 1]
    step = max(1, _CHUNK // max(payload[:1].numel(), 1))
    for start in range(0, len(values), step):
        value, got = values[start : start + step], payload[start : start + step]
        scale = descale if len(descale) == 1 else descale[start : start + step]
        if case.kv_dtype == "auto":
            wrong = bits_of(value) != bits_of(got)
        else:
            exact = value.to(torch.float64)
            limit = stored.largest * scale
            allowed = stored.unit_roundoff * exact.abs() + stored.half_subnormal * scale
            slack = 2.0**-20 * allowed + 2.0**-23 * exact.abs()  # the quotient is one of float32
            wrong = (got.to(torch.float64) * scale - exact.clamp(-limit, limit)).abs() > allowed + slack
            wrong |= got.to(torch.float32).isnan() | is_poison(got)
        if bool(wrong.any()):
            key, head, dim = wrong.nonzero()[0].tolist()
            at = float(scale.expand_as(value)[key, head, dim])
            seq, pos = problem.place_of(start + key)
            raise SetupBug(
                f"{which}_cache",
                f"{float(value[key, head, dim]):g} at sequence {seq}, position {pos}, head {head}, dim {dim}, "
                f"stored as {stored.name} at descale {at:g}",
                f"payload {float(got[key, head, dim]):g}",
                "payload = value / descale",
            )


def _verify_pool(problem: Problem, cache: KVCache, content: Content, dead_pages: frozenset[int], which: str) -> None:
    case = problem.case
    tensor = cache.k if which == "k" else cache.v
    _, payload = _of(problem, cache, which)
    heads, dim = payload.shape[1:]
    where = address(tensor, case.layout, which, heads, dim)
    flat, dead = storage_bits(tensor), Dead.of(cache.pool(which), tensor)
    poison = poison_bits(element_type(case.stored_dtype))
    tail = tail_bits(element_type(case.stored_dtype), case.tail)
    for part in _slots_in_use(problem, cache, content, dead_pages, max(1, _CHUNK // (heads * dim))):
        offsets = where.offsets(part.page, part.slot)  # [n, heads * dim]
        dead.take(offsets)
        got, want = flat[offsets], torch.full_like(offsets, tail, dtype=flat.dtype)
        live = part.key >= 0
        want[live] = bits_of(payload).flatten(1)[part.key[live]]
        if bool((got != want).any()):
            index = int((got != want).any(dim=1).nonzero()[0])
            found = got[index].view(heads, dim).view(payload.dtype)
            _raise_slot(problem, cache, content, which, part, index, found)
    for decoy in (d for d in cache.decoys if d.which == which):
        dead.take(decoy.offsets)
        if bool((flat[decoy.offsets] != decoy.bits).any()):
            raise SetupBug(f"{which}_cache", "the content that tells a wrong address", "other content")
    if (offset := dead.stray(flat, poison)) is not None:
        _raise_stray(cache, which, tensor, where, flat, offset, dead_pages)
    if any(bool((part != poison & 0xFF).any()) for part in cache.pool(which).shared):
        raise SetupBug(f"{which}_cache", "poison in the memory that all unused addresses share", "something else")


@dataclass(frozen=True)
class _Slots:
    """Some slots of the pages in use and alive, one by one; `key` is the packed key a slot must hold, -1 for none."""

    seq: torch.Tensor  # [n]
    pos: torch.Tensor  # [n] position in the sequence that the slot stands for
    page: torch.Tensor  # [n]
    slot: torch.Tensor  # [n]
    key: torch.Tensor  # [n]


def _slots_in_use(
    problem: Problem, cache: KVCache, content: Content, dead_pages: frozenset[int], count: int
) -> list[_Slots]:
    """Every slot that the page table gives a sequence, those of dead pages apart, at most `count` at a time."""
    dead = torch.tensor(sorted(dead_pages), dtype=torch.int64, device=cache.k.device)
    rows, device, page_size = problem.case.rows, cache.k.device, problem.case.page_size
    parts = []
    for seq, (query_len, context_len) in enumerate(zip(rows.query_lens, rows.context_lens, strict=True)):
        seq_len = max(query_len + context_len, 0)
        pos = torch.arange(-(-seq_len // page_size) * page_size, device=device)
        needed = len(pos) // page_size
        ids = page_ids(cache, seq, needed)
        if len(ids) < needed or not bool(((ids >= 0) & (ids < cache.num_pages)).all()):
            expected = f"{needed} page ids in [0, {cache.num_pages}) for sequence {seq}"
            raise SetupBug(table_name(cache), expected, str(sorted(set(ids.tolist()))))
        page = ids[pos // page_size]
        demanded = content.cached_len(query_len, context_len)
        key = torch.where(pos < demanded, problem.key_start[seq] + pos, -1)
        if problem.case.placement.repeats:
            key = _latest(key, page.to(torch.int64) * page_size + pos % page_size)
        alive = ~torch.isin(page.to(torch.int64), dead)
        slots = (torch.full_like(pos, seq), pos, page, pos % page_size, key)
        parts.append(_Slots(*(column[alive] for column in slots)))
    if not parts:
        return []
    joined = [torch.cat([getattr(part, name) for part in parts]) for name in ("seq", "pos", "page", "slot", "key")]
    return [_Slots(*chunk) for chunk in zip(*(torch.split(column, count) for column in joined), strict=True)]


def _latest(key: torch.Tensor, cell: torch.Tensor) -> torch.Tensor:
    """`key` [n] of the slots `cell` [n], where a slot that stands for two positions has the larger of their keys."""
    cells, which = torch.unique(cell, return_inverse=True)
    return torch.full_like(cells, -1).scatter_reduce_(0, which, key, "amax")[which]


def _raise_slot(
    problem: Problem, cache: KVCache, content: Content, which: str, part: _Slots, index: int, found: torch.Tensor
) -> None:
    """`found` [heads, dim] is what the slot holds instead."""
    seq, pos = int(part.seq[index]), int(part.pos[index])
    rows = problem.case.rows
    query_len, context_len = rows.query_lens[seq], rows.context_lens[seq]
    demanded = content.cached_len(query_len, context_len)
    row = f"{phase(query_len)} row, sequence {seq}"
    tokens = f"positions 0..{demanded - 1}" if demanded else "no tokens"
    expected = f"{row}: {tokens} (content class {content.value}: {_why(content, query_len)})"
    hint = (
        ""
        if pos < demanded
        else "slots behind the cached tokens must not be read, and hold poison so that a read shows"
    )
    raise SetupBug(f"{which}_cache", expected, describe_slot(problem, cache, which, seq, pos, demanded, found), hint)


def _why(content: Content, query_len: int) -> str:
    if content is Content.ALL:
        return "the cache is the only source of keys and values"
    if content is Content.BY_PHASE and is_decode(query_len):
        return "a decode kernel has no other source for the current token"
    if content is Content.WRITTEN:
        return "the writer is yet to store the new tokens"
    return "new tokens arrive as k and v arguments"


def _raise_stray(
    cache: KVCache,
    which: str,
    tensor: torch.Tensor,
    where: Address,
    flat: torch.Tensor,
    offset: int,
    dead_pages: frozenset[int],
) -> None:
    """An element outside all pages in use and alive that is no poison."""
    page = min((offset - where.origin) // where.page, cache.num_pages - 1)
    slots = torch.arange(cache.page_size, device=flat.device)
    hit = (where.offsets(torch.full_like(slots, page), slots) == offset).any(dim=1).nonzero()
    kind = "out of the window" if page in dead_pages else "the null page" if page == 0 else "unused"
    place = f"page {page} ({kind}), slot {int(hit[0])}" if len(hit) else f"the stride gap in page {page}"
    value = flat[offset : offset + 1].view(tensor.dtype)
    raise SetupBug(
        f"{which}_cache",
        f"poison in {place}",
        describe_value(value[0]),
        "memory that no token owns must be poison: a finite value hides that it is read",
    )


def _verify_new_tokens(problem: Problem, cache: KVCache, content: Content, which: str) -> None:
    rows, new = problem.case.rows, cache.new_k if which == "k" else cache.new_v
    values = problem.k if which == "k" else problem.v
    if not content.takes_new_tokens or new is None:
        if (new is None) == content.takes_new_tokens:
            raise SetupBug(which, f"what content class {content.value} takes", "None" if new is None else "a tensor")
        return
    token = 0
    for seq, (query_len, context_len) in enumerate(zip(rows.query_lens, rows.context_lens, strict=True)):
        in_cache = content.cached_len(query_len, context_len)
        poison = poison_bits(element_type(problem.case.dtype))
        want = torch.full_like(bits_of(new[token : token + query_len]), poison)  # [query_len, heads, dim]
        first = max(in_cache, context_len, 0)  # position of the first token that is an argument
        end = context_len + query_len
        if first < end:
            start = problem.key_start[seq]
            want[first - context_len :] = bits_of(values[start + first : start + end])
        wrong = (bits_of(new[token : token + query_len]) != want).flatten(1).any(dim=1)
        if bool(wrong.any()):
            at = int(wrong.nonzero()[0])
            is_argument = first <= context_len + at < end
            expected = "its new token" if is_argument else "poison: a kernel must not take this token from here"
            got = describe_value(new[token + at].flatten()[0])
            raise SetupBug(which, f"{phase(query_len)} row, sequence {seq}, token {at}: {expected}", got)
        token += query_len


def _of(problem: Problem, cache: KVCache, which: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and payload [num_keys, heads, dim] of K or V."""
    return (problem.k, cache.key_payload) if which == "k" else (problem.v, cache.value_payload)
