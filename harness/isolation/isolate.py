"""Which side of isolation a process is on: a worker, that records; a controller, that reads; or the only process.

Invariant: every process that runs cases has a recorder; every controller of workers that run cases has a post-mortem.
"""

from __future__ import annotations

import os
from pathlib import Path

from harness.errors import UsageError
from harness.isolation.fence_search import FenceSearch
from harness.isolation.postmortem import JOURNAL, Postmortem
from harness.isolation.recorder import Recorder
from harness.isolation.sanitizer import find_tool
from harness.isolation.workers import set_up_workers
from harness.session import Session


def isolate(session: Session) -> str:
    """Register what isolates the cases of a session; where they run, in words for the header, "" for nothing to say.

    To be called before pytest-xdist is configured. Raises UsageError for options that cannot be used.
    """
    config, limit = session.config, session.case_timeout
    fresh, chosen = config.getoption("--isolate"), config.getoption("--fault")
    if session.is_worker:
        if journal := vars(config)["workerinput"].get(JOURNAL):
            own = Path(journal)
            file = own.open("w", encoding="utf-8")
            config.pluginmanager.register(Recorder(file, limit, disposable=True, fresh=fresh, turns=own.parent))
        return ""
    if config.getoption("--sanitize"):
        find_tool()
        if config.getoption("--device") == "cpu":
            raise UsageError("--sanitize: compute-sanitizer sees kernels of a GPU only, not --device cpu")
    where = set_up_workers(config)
    if where and config.getoption("tx", None):
        config.pluginmanager.register(Postmortem(session))
        if config.getoption("--fences"):
            config.pluginmanager.register(FenceSearch(session))
    elif where:
        alone = chosen is not None  # in a process that attnreg started for this case
        for option in ("--isolate", "--fences"):
            if config.getoption(option) and not alone:
                raise UsageError(f"{option} needs worker processes: {where}")
        if not config.getoption("usepdb"):
            stderr = os.fdopen(os.dup(2), "w")  # a copy, as pytest captures the real one while cases run
            fault = Path(chosen) if chosen else None
            config.pluginmanager.register(Recorder(stderr, limit, disposable=False, fault=fault))
    return where
