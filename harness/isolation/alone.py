"""One case in a process of its own: what its reproduce line does, with the record brought back.

Invariant: the child runs exactly the command that the record shows to people, in process and into a run log of its own;
whatever becomes of it, the caller gets an answer within the time limit and some grace to start.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.isolation.autopsy import Death
from harness.isolation.fault_address import Fault, read_fault
from harness.kernel.buffer_map import Span, read_buffer_map
from harness.session import PROJECT, Session
from harness.store.record import Record
from harness.store.run_log import LATEST, read_run

GRACE = 120.0  # seconds to start and to end, beside the case


@dataclass(frozen=True)
class Alone:
    """What became of the child: its record, or how it ended where it left none."""

    record: Record | None
    death: Death
    started: bool = True  # whether it came to the case
    output: str = ""  # stdout and stderr
    buffers: tuple[Span, ...] = ()  # of its launch
    fault: Fault | None = None  # the access it died of


def run_alone(
    session: Session,
    reproduce: str,
    *,
    environment: Mapping[str, str],
    under: Sequence[str] = (),
    limit: float | None = None,
) -> Alone:
    """Run the command line `reproduce` in a child process.

    environment: variables it has beside those of this process. under: a command that the child runs under. limit:
    seconds for the case, where it is not that of the session.
    """
    limit = session.case_timeout if limit is None else limit
    config = session.config
    with tempfile.TemporaryDirectory(prefix="attnreg-") as folder:
        command = [*under, sys.executable, "-m", "pytest", *shlex.split(reproduce)[1:]]
        command += ["-p", "harness.plugin", "-p", "no:cacheprovider", f"--rootdir={config.rootpath}"]
        buffers, fault = Path(folder) / "buffers.json", Path(folder) / "fault"
        command += [f"--reports={folder}", f"--case-timeout={limit}", f"--buffer-map={buffers}", f"--fault={fault}"]
        command += ["-n0"] if config.pluginmanager.hasplugin("xdist") else []
        command += ["-c", str(config.inipath)] if config.inipath else []
        path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(PROJECT))))
        status: int | None = None
        out: bytes | None
        err: bytes | None
        try:
            done = subprocess.run(
                command,
                cwd=config.rootpath,
                env={**os.environ, **environment, "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=limit + GRACE if limit else None,
                check=False,
            )
            status, out, err = done.returncode, done.stdout, done.stderr
        except subprocess.TimeoutExpired as error:
            out, err = error.stdout, error.stderr
        log = Path(folder) / LATEST
        records = read_run(log)[1] if log.exists() else []
        return Alone(
            record=records[0] if records else None,
            death=Death(status, _text(err)),
            started=log.exists(),
            output=_text(out) + _text(err),
            buffers=tuple(read_buffer_map(buffers)),
            fault=read_fault(fault),
        )


def _text(written: bytes | None) -> str:
    return (written or b"").decode(errors="replace")
