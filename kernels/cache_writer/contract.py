"""Contract of the cache writer: new tokens into their slots, quantised."""

from __future__ import annotations

from harness.kernel.writer import WriterContract

KERNELS: tuple[WriterContract, ...] = (
    WriterContract(
        name="cache_writer",
        about="reshape and cache: stores new k and v in the slots that slot_mapping names, quantised for an fp8 cache",
        entry="cache_writer.py:launch",
        kv_dtypes=frozenset({"auto", "fp8_e4m3", "fp8_e4m3fnuz", "fp8_e5m2", "fp8_e5m2fnuz", "int8"}),
        descales_per=frozenset({"tensor", "head", "page", "token"}),
        launches=("cache_writer_kernel",),
        needs=("triton",),
        install_hint="pip install triton; on a CPU its interpreter runs the same source",
    ),
)
