"""What a tracking server lets in, and what PostgreSQL's own programs are told."""

from pathlib import Path

import pytest
from mlflow.server.security_utils import is_allowed_host_header
from sqlalchemy.engine import make_url

from defect_detection.operations import postgres, tracking_server
from defect_detection.operations.tracking_server import ServerPlan


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
