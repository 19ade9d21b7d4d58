"""A case has the same bits on every device and in every version: the seeds of a record rebuild it anywhere."""

from __future__ import annotations

import hashlib

import pytest
import torch

from harness.case import Case, Rows
from harness.problem.admission import LAWS
from harness.problem.problem import Problem, build_problem

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
ROWS = Rows("mix", (40, 1, 4), (100, 300, -2))
# One line per law: a new law adds a line and changes none.
BITS = {
    "normal": "62abeab743d4d76b5130e59fc6d46b554030f723b030093e5b08ae2d62979cf1",
    "probe": "ef64b5916273de2b967912e54dd892f51413b8f8d26d77539c42734031b07499",
    "needle": "4186df8118a8df683c9c42db3d481bcea68c6acb8142808195cf18a9fd6a8739",
    "uniform": "a14930a2a5a9c3942b8013611be954a79b7eab280ae98149ffb4b086634a1a55",
    "outliers": "75051a1c8809d97b2a6c06fe5a7657127bb5a9af03d4544574b91c1f44925e06",
    "negative": "f6a0170756e8db074b92afe0741f80d56f66e21f974d2c5e31899f3aabb1592c",
    "needle_edges": "4355f0d16f1683b3e38e511177121a03d5acf820666b372b91737b16b80b8ff6",
    "rising": "15866aeb7ec9b7c00e4f40a2eb8ece06e787390c53f4c61a1c59d966be0b5c59",
    "falling": "cae35bb422014a866f20ba578a59a589412886fe2dd147cd54dc6f173db75269",
    "large": "3968d8ec8960747c986f90ad8a76684056bfc499d8c68938ddbc8da8bb4af4a6",
    "biased": "722068099dcd8d38229c1c416a90562befb91cb233a5b5515ae355ff386704bc",
    "bar_codes": "3b41f48d99465ed90c33070acb2a9401253f8c876a7a438f4631492c965e4820",
    "tiny": "edd4714d569fca672936ba46813b32069ef799cf83a07f0c06eac367acf3be82",
}
DESCALE_BITS = {
    ("tensor", "loud"): "6e5d5776ea7faef289a69b44c13201e79b29225da4cc1def65eb58aae11ed211",
    ("page", "quiet"): "bdf55283607cb63600abe54f148fc6efb31edc2c18da072528c6a117396b9803",
    ("page", "loud"): "388f1d62c9f676ea3affe847e36e354ef7d040e86cf38f77a4be924675d86972",
    ("tensor", "one"): "9bafb2889a2bb939ad7066017e329f4c10de13f2a4d4647b6e2592371a73e3f9",
    ("head", "loud"): "4adca53730debff2407a6665462b8d018ce869e4bc93a82316a48d5d8b01ce12",
    ("page", "equal"): "bef68a34796811d17ec45ba5afc2996755c73324abb85710f323d675cab94811",
    ("token", "loud"): "8dba17bbbe0ab47f6da7e7996c6e669a2b53544d4ab62c378c09772ce61b53be",
    ("token", "quiet"): "0a2a76ae83afd38e494381d8e76c1529e03e82e3255e6833da64e2cf538f2aae",
}


def digest(problems: list[Problem]) -> str:
    """SHA-256 over q, k, v, sinks and descales."""
    found = hashlib.sha256()
    for p in problems:
        for tensor in (p.q, p.k, p.v, p.sinks, p.descales):
            if tensor is not None:
                found.update(tensor.float().cpu().numpy().tobytes())
        found.update(repr((p.q_descale, p.output_scale)).encode())
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
@pytest.mark.parametrize(("per", "law"), DESCALE_BITS)
def test_descales_have_the_bits_of_every_other_device(per: str, law: str, device: str) -> None:
    cases = [
        Case("m", "k", ROWS, kv_dtype="fp8_e4m3", descales_per=per, descales=law, data=data)
        for data in ("normal", "needle")
    ]
    assert digest([build_problem(case, torch.device(device)) for case in cases]) == DESCALE_BITS[per, law]
