"""A case has the same bits on every device and in every version: the seeds of a record rebuild it anywhere."""

from __future__ import annotations

import hashlib

import pytest
import torch

from harness.case import Case, Rows
from harness.problem.admission import DESCALES, LAWS
from harness.problem.problem import Problem, build_problem

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
ROWS = Rows("mix", (40, 1, 4), (100, 300, -2))
# One line per law: a new law adds a line and changes none.
BITS = {
    "normal": "ada1abe2ef83a2c6f6711185ed993ec8e3b9f42206a846c3b0f68dd699e63ae8",
    "probe": "0354da6e060a0fa01c940767716a0b823e9c0857322cb1816446abef50025810",
    "needle": "ca526f0cfb3045ba515f81ed648550b243f8bc4aa2eb957879818d140d4abf2f",
    "uniform": "9c0de20ebe1af37ad39a34a0253af350bfaa5ebb900ba6d62ade1a8440dafdcb",
    "outliers": "44d0ab61133511f595f05d1304fd8ae8e24ad37c314b1704fb3652cb02002511",
    "negative": "b6f7abaa584254706514ea5af0aea262607fbfa44e08240ff0b06a9ef5788ce0",
    "needle_edges": "8f0ebecca230f113a04da64e362095d1c7d9c2c6088ff93bb27690fe0f1d92b9",
    "rising": "77c123878813254d1d70a1fb5d3601642387ebd57878dc54176f782dd3537cc3",
    "falling": "b7210481a746e7fa060b5381c51fbe5516dbb62a73e0c4ed57251172d26bbbc5",
    "large": "272116e4bce1fbf659d62f7ffb849c1a72df096f0ee2d47a0da6398ea0e9eea4",
    "biased": "ed12b3946dea26a0e581b2d39245ed0c576479fbb77d9867eababd22036c2e20",
    "bar_codes": "e1b86be4fc4fc50819e3cfd5d9d35151c10d9f258de736f04dd887ab85b7fe46",
    "tiny": "23c86d4e911c728373aec6f9f35039381aee8d60a5c6fb366763736eac6bc76b",
}
PAGE_BITS = {
    "per_tensor": "73bde78e647b19563574cf68e25789931d5d6c11c1375c638e32caf72b72f237",
    "quiet": "eecf7d8718c0e02d8b243684ef77fcdeeca190b1fa168a0a375e6e6cea513cbc",
    "loud": "ec00002d06215d8a969e18208d6195418ae8d57db24f12500ea5b5dd2711d71d",
    "one": "865408c657649d06ad00ec76dce496938886e500a95d17d3ce983294f35f9744",
}


def digest(problems: list[Problem]) -> str:
    """SHA-256 over q, k, v, sinks and descales."""
    found = hashlib.sha256()
    for p in problems:
        for tensor in (p.q, p.k, p.v, p.sinks, p.page_descales):
            if tensor is not None:
                found.update(tensor.float().cpu().numpy().tobytes())
        found.update(repr((p.k_scale, p.v_scale)).encode())
    return found.hexdigest()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("data", LAWS)
def test_laws_have_the_bits_of_every_other_device(data: str, device: str) -> None:
    cases = [
        Case("m", "k", ROWS, kv_dtype=kv_dtype, sliding_window=33, sinks=True, data=data)
        for kv_dtype in ("auto", "fp8_e4m3", "fp8_e5m2")
    ]
    assert digest([build_problem(case, torch.device(device)) for case in cases]) == BITS[data]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("descales", DESCALES)
def test_descales_have_the_bits_of_every_other_device(descales: str, device: str) -> None:
    cases = [Case("m", "k", ROWS, kv_dtype="fp8_e4m3", descales=descales, data=data) for data in ("normal", "needle")]
    assert digest([build_problem(case, torch.device(device)) for case in cases]) == PAGE_BITS[descales]
