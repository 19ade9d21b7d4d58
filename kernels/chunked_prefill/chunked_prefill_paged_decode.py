"""Mixed batches: prefill rows through prefix_prefill, decode rows through paged_decode.

Invariant: rows are told apart by query_len == 1 alone. A decode row therefore finds its newest token in the cache and
its k and v rows unread, even where it is the one-token remainder of a long prompt.
"""

from __future__ import annotations

from harness.kernel.arguments import LaunchArguments

from . import paged_decode, prefix_prefill


def launch(args: LaunchArguments) -> None:
    """Adapter. Class `by_phase`."""
    if args.max_query_len > 1:
        prefix_prefill.launch(args, skip_decode=True)
    paged_decode.launch(args)
