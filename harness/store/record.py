"""Record: what one run keeps about one case, and Header: what it keeps about itself. One line of JSON each.

Invariant: from_json(to_json(x)) == x, for every record and header; a line that is not exactly that is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from harness.case import Case
from harness.errors import AttnregError
from harness.run.outcome import Outcome, Verdict
from harness.store.plain import as_float, dump_line, plain_dict

FORMAT_VERSION = 4  # raise it whenever a field of Record or Header is added, removed or changes its meaning


class MalformedRecord(AttnregError):
    """A line of a run log that is not a header or record of this format."""


@dataclass(frozen=True)
class Record:
    """The result of one case. `explanation` and `case` are plain data (harness.store.plain)."""

    kind: ClassVar[str] = "record"

    id: str
    matrix: str
    matrix_path: str
    line: int  # of the matrix in its file
    tier: str
    kernel: str
    outcome: Outcome
    reason: str
    ran: tuple[str, ...] = ()  # device kernels that were launched
    err_over_tol: float | None = None  # worst error of out in units of its tolerance
    lse_err_over_tol: float | None = None
    z: float | None = None  # largest |z| of the page matched filter
    tighter_err_over_tol: float | None = None  # as in harness.run.outcome
    seeds: dict[str, int] = field(default_factory=dict)  # geometry, data
    seconds: dict[str, float] = field(default_factory=dict)  # by phase
    reproduce: str = ""
    explanation: dict[str, Any] | None = None  # harness.triage
    worker: str = ""
    case: dict[str, Any] = field(default_factory=dict)  # axis values
    access: str = ""  # as in harness.run.outcome
    law: str = ""  # the data law that was taken for `data: auto`
    memory: dict[str, Any] | None = None  # of the KV cache, as in harness.run.outcome
    branch: str = ""  # as in harness.run.outcome

    @classmethod
    def of(
        cls,
        case: Case,
        verdict: Verdict,
        *,
        id: str,
        matrix_path: str,
        line: int,
        tier: str,
        reproduce: str,
        worker: str = "",
    ) -> Record:
        """The record of `verdict` on `case`; seeds come from the verdict, or from the case where it names none."""
        seeds = {"geometry": case.geometry_seed, "data": case.data_seed} | (verdict.seeds or {})
        return cls(
            id=id,
            matrix=case.matrix,
            matrix_path=matrix_path,
            line=line,
            tier=tier,
            kernel=case.kernel,
            outcome=verdict.outcome,
            reason=verdict.reason,
            ran=tuple(verdict.ran),
            err_over_tol=verdict.err_over_tol,
            lse_err_over_tol=verdict.lse_err_over_tol,
            z=verdict.z,
            tighter_err_over_tol=verdict.tighter_err_over_tol,
            seeds=seeds,
            seconds=dict(verdict.seconds or {}),
            reproduce=reproduce,
            explanation=None if verdict.explanation is None else plain_dict(verdict.explanation),
            worker=worker,
            case=plain_dict(asdict(case)),
            access=verdict.access,
            law=verdict.law,
            memory=verdict.memory,
            branch=verdict.branch,
        )

    def to_json(self) -> str:
        return _to_json(self)

    @classmethod
    def from_json(cls, text: str) -> Record:
        """Inverse of to_json; MalformedRecord for anything else."""
        values = _checked_fields(cls, text)
        try:
            values["outcome"] = Outcome(values["outcome"])
            values["ran"] = tuple(values["ran"])
            values["seconds"] = {phase: as_float(seconds) for phase, seconds in values["seconds"].items()}
            for name in ("err_over_tol", "lse_err_over_tol", "z", "tighter_err_over_tol"):
                values[name] = None if values[name] is None else as_float(values[name])
        except (ValueError, TypeError, AttributeError) as error:
            raise MalformedRecord(f"record '{values['id']}': {error}") from None
        return cls(**values)


@dataclass(frozen=True)
class Header:
    """The first line of a run log: enough to know what was run, on what, and how it was changed on purpose."""

    kind: ClassVar[str] = "header"

    run: str  # run id
    started: str  # ISO 8601, UTC
    argv: tuple[str, ...] = ()
    environment: dict[str, Any] = field(default_factory=dict)  # harness.store.environment
    seeds: dict[str, int] = field(default_factory=dict)  # seeds given on the command line
    plants: tuple[str, ...] = ()  # faults planted on purpose
    options: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT_VERSION

    def to_json(self) -> str:
        return _to_json(self)

    @classmethod
    def from_json(cls, text: str) -> Header:
        """Inverse of to_json; MalformedRecord for anything else, other formats included."""
        values = _checked_fields(cls, text)
        try:
            values["argv"], values["plants"] = tuple(values["argv"]), tuple(values["plants"])
        except TypeError as error:
            raise MalformedRecord(f"header: {error}") from None
        return cls(**values)


Line = TypeVar("Line", Record, Header)


def _to_json(line: Record | Header) -> str:
    return dump_line({"kind": line.kind} | {f.name: getattr(line, f.name) for f in fields(line)})


def _checked_fields(cls: type[Line], text: str) -> dict[str, Any]:
    """The fields of one line, by name; MalformedRecord unless they are exactly the fields of `cls`."""
    try:
        values = json.loads(text, parse_constant=_refuse_constant)
    except ValueError as error:
        raise MalformedRecord(f"not JSON: {error}") from None
    if not isinstance(values, Mapping) or values.get("kind") != cls.kind:
        raise MalformedRecord(f"not a {cls.kind}")
    found = {name: value for name, value in values.items() if name != "kind"}
    if cls is Header and found.get("format") != FORMAT_VERSION:
        raise MalformedRecord(f"run log of format {found.get('format')!r}; this attnreg reads format {FORMAT_VERSION}")
    known = {f.name for f in fields(cls)}
    if missing := sorted(known - found.keys()):
        raise MalformedRecord(f"{cls.kind} without {', '.join(missing)}")
    if unknown := sorted(found.keys() - known):
        raise MalformedRecord(f"{cls.kind} with unknown {', '.join(unknown)}")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not strict JSON")
