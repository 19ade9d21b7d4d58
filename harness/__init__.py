"""attnreg: correctness regression of attention kernels that read a paged, possibly quantised KV cache.

Data flows one way: case, problem, cache, launch, findings, verdict, record, report (ARCHITECTURE.md).
"""

__version__ = "0.1.0"
