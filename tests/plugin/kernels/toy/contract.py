"""An honest kernel in plain torch and others with one fault each, to see what a session makes of them."""

from __future__ import annotations

from dataclasses import replace

from harness.cache.content import Content
from harness.kernel.contract import FEATURES, Contract
from harness.kernel.numerics import NumericsProfile


def _toy(name: str, about: str) -> Contract:
    return Contract(
        name=f"toy_{name}",
        about=about,
        entry=f"toy.py:{name}",
        content=Content.ALL,
        features=frozenset({"prefill", "strided_cache", "softmax_scale"}) & FEATURES.keys(),
        dtypes=frozenset({"fp32"}),
        layouts=frozenset({"linear_nhd"}),
        returns_lse=False,
        numerics=NumericsProfile(kv_dequant="exact", p_dtype="fp32", mma="simt"),
    )


KERNELS = (
    _toy("honest", "right"),
    _toy("zeros", "writes zeros"),
    _toy("silent", "writes nothing"),
    _toy("forgetful", "does not read the newest token"),
    _toy("greedy", "writes into its own input"),
    _toy("overrun", "writes behind its output"),
    _toy("raising", "raises"),
    _toy("exiting", "ends the process"),
    _toy("segfaulting", "reads address 0"),
    _toy("fenced", "reads a page of v_cache that nothing is mapped to"),
    _toy("aborting", "aborts"),
    _toy("spinning", "does not end"),
    _toy("hungry", "asks for more memory than there is"),
    _toy("gorging", "asks torch for more memory than there is"),
    _toy("littering", "right, but leaves something behind"),
    _toy("unsociable", "right, but not while another process runs it"),
    _toy("wavering", "right, but in its last bit another each time"),
    _toy("stumbling", "right, but dies over what an earlier case left behind"),
    _toy("skipping", "asks to be skipped"),
    _toy("quitting", "exits"),
    replace(_toy("illegal", "stores where nothing is mapped"), entry="on_device.py:illegal", needs=("triton",)),
    replace(_toy("asserting", "fails a device assert"), entry="on_device.py:asserting", needs=("triton",)),
    replace(_toy("endless", "does not end on the device"), entry="on_device.py:endless", needs=("triton",)),
    *(
        replace(_toy(f"beyond_{buffer}", "touches what lies beyond a buffer"), entry=f"beyond.py:{buffer}")
        for buffer in (
            "block_table",
            "seq_lens",
            "query_start_loc",
            "q",
            "k_cache",
            "v_cache",
            "v_scale",
            "out",
            "workspace",
            "far_behind",
            "before",
        )
    ),
    _toy("careless", "right, and leaves torch with other settings"),
    replace(_toy("broken", "does not exist"), entry="no_such_file.py:launch"),
    replace(_toy("rude", "right, and leaves torch with other settings when imported"), entry="rude.py:honest"),
    replace(
        _toy("honest", "right, and declared to round P to bfloat16, which it does not"),
        name="toy_loose",
        launches=(),
        numerics=NumericsProfile(kv_dequant="exact", p_dtype="bf16", mma="simt"),
    ),
)
