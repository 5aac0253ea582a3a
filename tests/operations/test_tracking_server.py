"""What a tracking server lets in, and what PostgreSQL's own programs are told."""

from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.server.security_utils import is_allowed_host_header
from sqlalchemy.engine import make_url

from conftest import within
from defect_detection import PipelineError
from defect_detection.operations import migration, postgres, tracking_server
from defect_detection.operations.tracking_server import ServerPlan
from defect_detection.registry.store import connected, open_experiment


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        *((name, True) for name in ("localhost:5000", "127.0.0.1:5000", "10.0.0.5", "[::1]:5000")),
        *((name, True) for name in ("192.168.0.10:80", "[fd12::1]", "mlflow.plant.example:5000")),
        *((name, False) for name in ("localhost.evil.example", "10.evil.example", "1evil.example")),
        *((name, False) for name in ("10.0.0.5.evil.example:5000", "evil.example", "")),
    ],
)
def test_only_its_own_names_and_addresses_reach_it(host: str, allowed: bool):
    """A name of the internet that was made to lead here is another one."""
    plan = ServerPlan(Path("/srv"), "0.0.0.0", 5000, ("MLflow.plant.example",), "", "")
    assert is_allowed_host_header(tracking_server._hosts(plan), host) is allowed


def test_programs_get_a_database_with_its_options_and_without_its_password():
    uri = "postgresql://mlflow:a:\\secret@db.example:5433/plant?sslmode=verify-full&sslrootcert=/ca"
    with postgres.for_programs(uri) as told:
        url = make_url(told)
        assert "secret" not in told
        assert (url.username, url.host, url.port, url.database) == (
            *("mlflow", "db.example", 5433, "plant"),
        )
        file = Path(str(url.query["passfile"]))
        assert dict(url.query) == {
            **{"sslmode": "verify-full", "sslrootcert": "/ca", "passfile": str(file)},
        }
        assert file.read_text() == "*:*:*:*:a\\:\\\\secret\n"
        assert file.stat().st_mode & 0o077 == 0
    assert not file.exists()


def test_a_driver_that_is_not_installed_is_one_line(tmp_path: Path, monkeypatch):
    """As where `src/server.py` is run, and not `make server`."""
    monkeypatch.setattr(postgres, "find_spec", lambda name: None)
    plan = ServerPlan(tmp_path / "server", "127.0.0.1", 5000, (), "postgresql://a@b/c", "")
    with pytest.raises(PipelineError, match="pip install -r requirements-server.txt"):
        with tracking_server.own(plan):
            pass


def test_a_database_that_does_not_answer_is_told_at_once(tmp_path: Path):
    database = "postgresql://mlflow:a-secret@127.0.0.1:1/plant"
    plan = ServerPlan(tmp_path / "server", "127.0.0.1", 5000, (), database, str(tmp_path))
    with within(20), pytest.raises(PipelineError, match="127.0.0.1:1/plant cannot be used") as said:
        with tracking_server.own(plan):
            pass
    assert "\n" not in str(said.value) and "a-secret" not in str(said.value)


def test_open_runs_of_a_store_that_is_taken_over_are_ended_there_and_not_here(tmp_path: Path):
    """Their processes know the store that they write to, so nobody would end the copies."""
    uris = [f"sqlite:///{tmp_path}/{name}.db" for name in ("here", "server")]
    with connected(uris[0], create=True):
        run = MlflowClient().create_run(open_experiment("train/open")).info.run_id
    found = migration.take_over(
        tmp_path / "here.db", tmp_path, uris[1], str(tmp_path / "artifacts")
    )
    assert found.rows["runs"] == 1
    for uri, status in zip(uris, ("RUNNING", "KILLED"), strict=True):
        with connected(uri):
            assert MlflowClient().get_run(run).info.status == status
