"""Workers share the cores of a machine."""

from __future__ import annotations

from harness.plugin import share_cores


def test_a_worker_takes_its_share_of_the_cores_and_no_more() -> None:
    for workers, cores, want in ((12, 16, "1"), (4, 16, "4"), (64, 16, "1")):
        environ = {"PYTEST_XDIST_WORKER_COUNT": str(workers)}
        share_cores(environ, cores)
        assert environ["OMP_NUM_THREADS"] == want


def test_what_the_user_said_stays_and_a_run_without_workers_takes_all() -> None:
    environ = {"PYTEST_XDIST_WORKER_COUNT": "4", "OMP_NUM_THREADS": "3"}
    share_cores(environ, 16)
    assert environ["OMP_NUM_THREADS"] == "3"
    alone: dict[str, str] = {}
    share_cores(alone, 16)
    assert alone == {}
