"""What the servers' processes find in their environment."""

import pytest

from flows.servers import server_env

QUERY = "PREFECT_WORKER_QUERY_SECONDS"


def test_a_worker_looks_for_runs_more_often_than_by_default_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(QUERY, raising=False)
    assert float(server_env.worker("http://prefect", "http://mlflow", {})[QUERY]) < 10
    monkeypatch.setenv(QUERY, "30")
    assert server_env.worker("http://prefect", "http://mlflow", {})[QUERY] == "30"
