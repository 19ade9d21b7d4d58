"""The writers of contract.py: `torch_writer` is right, each other one is wrong in one way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from harness.cache.layouts import Slots, by_slot
from harness.cache.probe import storage_bits
from harness.cache.quantise import bits_of
from harness.kernel.writer import WriterArguments

Quantise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # values and descale -> float32 payload


def divided(values: torch.Tensor, descale: torch.Tensor) -> torch.Tensor:
    return values.float() / descale.expand_as(values)


def store(args: WriterArguments, slots: torch.Tensor, quantise: Quantise = divided) -> None:
    """Token i goes to slots[i], int64 [num_tokens]; negative ones nowhere."""
    token = (slots >= 0).nonzero()[:, 0]
    size = page_size_of(args)
    page, offset = slots[token] // size, slots[token] % size
    for new, cache, kind in ((args.k, args.k_cache, 0), (args.v, args.v_cache, 1)):
        values = new[token]  # [n, heads, dim]
        if args.kv_dtype != "auto":
            descale = (args.k_scale, args.v_scale)[kind]
            if args.kv_block_descale is not None:
                descale = args.kv_block_descale[page, :, kind, None]
            largest = torch.finfo(cache.dtype).max
            values = quantise(values, descale).clamp(-largest, largest).to(cache.dtype)
        memory(args)[kind].store(page, offset, bits_of(values.contiguous()))


def memory(args: WriterArguments) -> tuple[Slots, Slots]:
    """K and V as integers, by token."""
    return by_slot(bits_of(args.k_cache), args.layout, "k"), by_slot(bits_of(args.v_cache), args.layout, "v")


def page_size_of(args: WriterArguments) -> int:
    return args.k_cache.shape[1 if args.layout == "linear_nhd" else 3]  # of the layouts that are tried here


def torch_writer(args: WriterArguments) -> None:
    store(args, args.slot_mapping)


def without_descale(args: WriterArguments) -> None:
    store(args, args.slot_mapping, lambda values, descale: values.float())


def multiplied(args: WriterArguments) -> None:
    store(args, args.slot_mapping, lambda values, descale: values.float() * descale)


def descales_exchanged(args: WriterArguments) -> None:
    store(replace(args, k_scale=args.v_scale, v_scale=args.k_scale), args.slot_mapping)


def descale_of_head_0(args: WriterArguments) -> None:
    assert args.kv_block_descale is not None
    first = args.kv_block_descale[:, :1].expand_as(args.kv_block_descale)
    store(replace(args, kv_block_descale=first), args.slot_mapping)


def descale_of_page_1(args: WriterArguments) -> None:
    assert args.kv_block_descale is not None
    one = args.kv_block_descale[1:2].expand_as(args.kv_block_descale)
    store(replace(args, kv_block_descale=one), args.slot_mapping)


def toward_zero(args: WriterArguments) -> None:
    """e4m3 keeps 4 bits: the others are cut off."""

    def cut(values: torch.Tensor, descale: torch.Tensor) -> torch.Tensor:
        step = torch.maximum((torch.frexp(divided(values, descale))[1] - 4).float(), torch.tensor(-9.0))
        return (divided(values, descale) * 2.0**-step).trunc() * 2.0**step

    store(args, args.slot_mapping, cut)


def ties_away(args: WriterArguments) -> None:
    def away(values: torch.Tensor, descale: torch.Tensor) -> torch.Tensor:
        payload = divided(values, descale)
        step = 2.0 ** torch.maximum((torch.frexp(payload)[1] - 4).float(), torch.tensor(-9.0))
        return (payload.abs() / step + 0.5).floor() * step * payload.sign()

    store(args, args.slot_mapping, away)


def no_saturation(args: WriterArguments) -> None:
    """Beyond the largest number lies NaN in e4m3."""

    def overflowing(values: torch.Tensor, descale: torch.Tensor) -> torch.Tensor:
        payload = divided(values, descale)
        return torch.where(payload.abs() > 464.0, torch.nan, payload)

    store(args, args.slot_mapping, overflowing)


def twice_rounded(args: WriterArguments) -> None:
    store(args, args.slot_mapping, lambda values, descale: divided(values, descale).bfloat16().float())


def next_slot(args: WriterArguments) -> None:
    store(args, torch.where(args.slot_mapping >= 0, args.slot_mapping + 1, args.slot_mapping))


def token_skipped(args: WriterArguments) -> None:
    slots = args.slot_mapping.clone()
    slots[0] = -1
    store(args, slots)


def slots_exchanged(args: WriterArguments) -> None:
    slots = args.slot_mapping.clone()
    slots[:2] = slots[:2].flip(0)
    store(args, slots)


def padding_stored(args: WriterArguments) -> None:
    """-1 as Python counts: the last slot of the pool gets a number."""
    store(args, args.slot_mapping % (args.k_cache.shape[0] * page_size_of(args)))


def padding_to_slot_0(args: WriterArguments) -> None:
    store(args, args.slot_mapping.clamp(min=0))


def head_skipped(args: WriterArguments) -> None:
    """For linear_nhd."""
    kept = [slots.view[:, :, -1].clone() for slots in memory(args)]
    torch_writer(args)
    for slots, head in zip(memory(args), kept, strict=True):
        slots.view[:, :, -1] = head


def k_for_v(args: WriterArguments) -> None:
    store(replace(args, v=args.k, v_scale=args.k_scale), args.slot_mapping)


def page_cleaned(args: WriterArguments) -> None:
    """For linear_nhd: zeroes the slots behind the first token that it stores, on the same page."""
    page, offset = divmod(int(args.slot_mapping[0]), page_size_of(args))
    memory(args)[0].view[page, offset + 1 :] = 0
    torch_writer(args)


def gap_written(args: WriterArguments) -> None:
    torch_writer(args)
    elements = args.k_cache.untyped_storage().nbytes() // args.k_cache.element_size()
    bits_of(args.k_cache).as_strided((elements,), (1,), 0)[-1] = 0


def input_written(args: WriterArguments) -> None:
    torch_writer(args)
    args.k[0, 0, 0] = 0


def raising(args: WriterArguments) -> None:
    raise ValueError("no such slot")


def offsets_of_32_bits(args: WriterArguments) -> None:
    """For linear_nhd without quantisation: the offset of an element is a signed 32-bit number."""
    token = (args.slot_mapping >= 0).nonzero()[:, 0]
    slot, size = args.slot_mapping[token], page_size_of(args)
    for new, cache in ((args.k, args.k_cache), (args.v, args.v_cache)):
        page_stride, slot_stride, head_stride, _ = cache.stride()
        inner = torch.arange(new.shape[1])[:, None] * head_stride + torch.arange(new.shape[2])
        offset = (slot // size * page_stride + slot % size * slot_stride)[:, None, None] + inner.to(slot.device)
        memory = storage_bits(cache)
        memory[offset.to(torch.int32).long() + int(cache.storage_offset())] = bits_of(new)[token]


def carry_lost(args: WriterArguments) -> None:
    """Of the address of an entry of slot_mapping only the low 32 bits are added up."""
    number = torch.arange(len(args.slot_mapping), device=args.slot_mapping.device)
    carried = (args.slot_mapping.data_ptr() % 2**32 + 8 * number) // 2**32
    store(args, storage_bits(args.slot_mapping)[number - carried * 2**29 + int(args.slot_mapping.storage_offset())])
