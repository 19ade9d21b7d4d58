"""Reads what a matrix states about dispatch: which device kernels must run, and which branches its sweep leaves out.

Invariant: a statement that was read names a kernel, and one about a branch says why; whether kernels and branches of
these names exist is for contracts to say (harness.dispatch.stated).
"""

from __future__ import annotations

from collections.abc import Iterator

from yaml import Node, ScalarNode

from harness.matrix.matrix import TIERS, MustRun, Unreached
from harness.matrix.reading import Entries, Reader
from harness.matrix.source import Mistake, items, one_of, span_of, text, unknown_keys

MUST_RUN_KEYS = ("where", "kernel")
UNREACHED_KEYS = ("kernel", "branch", "because")
UNREACHED_TIERS = "tiers"


def read_must_run(reader: Reader, entries: Entries) -> Iterator[MustRun]:
    """The statements of `must_run` of the matrix with these `entries`."""
    with reader.source.collect():
        for node in items(entries["must_run"][1], "must_run") if "must_run" in entries else ():
            with reader.source.collect():
                fields = _fields(reader, node, "must_run", MUST_RUN_KEYS)
                kernel = fields["kernel"]
                yield MustRun(reader.where(fields["where"]), text(kernel, "kernel"), span_of(kernel))


def read_unreached(reader: Reader, entries: Entries) -> Iterator[Unreached]:
    """The statements of `unreached`; in every tier, where none is named."""
    with reader.source.collect():
        for node in items(entries["unreached"][1], "unreached") if "unreached" in entries else ():
            with reader.source.collect():
                fields = _fields(reader, node, "unreached", UNREACHED_KEYS, UNREACHED_TIERS)
                kernel, branch, because = (text(fields[key], key) for key in UNREACHED_KEYS)
                tiers = tuple(_tiers(fields[UNREACHED_TIERS])) if UNREACHED_TIERS in fields else TIERS
                spans = span_of(fields["kernel"]), span_of(fields["branch"])
                yield Unreached(kernel, branch, because, tiers, *spans)


def _fields(reader: Reader, node: Node, what: str, keys: tuple[str, ...], *optional: str) -> dict[str, Node]:
    """The value nodes of one statement by key. Raises Mistake where a key is missing."""
    entries = reader.source.entries(node, f"an element of {what}")
    for mistake in unknown_keys(entries, (*keys, *optional), f"{what} key"):
        reader.source.add(mistake)
    if missing := [key for key in keys if key not in entries]:
        raise Mistake(span_of(node), f"the element of {what} has no {', '.join(missing)}")
    return {key: value for key, (_, value) in entries.items()}


def _tiers(node: Node) -> Iterator[str]:
    """A tier, or a list of them."""
    for one in [node] if isinstance(node, ScalarNode) else items(node, UNREACHED_TIERS):
        yield one_of(text(one, "a tier"), TIERS, "tier", span_of(one))
