"""`make server` for tests: a tracking server with PostgreSQL, in a folder that is deleted."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from base64 import b64encode
from pathlib import Path

import pytest

from conftest import Project, free_port, wait_for
from defect_detection import PipelineError
from defect_detection.operations import postgres
from defect_detection.operations.tracking_server import Secrets


def require_postgres() -> None:
    """Skip the test where PostgreSQL or its driver is not installed."""
    pytest.importorskip("psycopg", reason="needs requirements-server.txt")
    try:
        postgres.program("initdb")
    except PipelineError as error:
        pytest.skip(str(error))


class TeamServer:
    """`python src/server.py` in a copy of the project, with a database of its own."""

    def __init__(self, project: Project, workers: int = 2):
        self.project, self.port = project, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        # PostgreSQL runs as another user if the tests run as root, who enters no folder of pytest.
        self.folder = Path(tempfile.mkdtemp(prefix="team-"))
        self.folder.chmod(0o711)
        self.process: subprocess.Popen | None = None
        self.variables = {
            "SERVER_PATH": str(self.folder / "server"),
            "SERVER_PORT": str(self.port),
            "SERVER_HOST": "127.0.0.1",
            "MLFLOW_WORKERS": str(workers),  # processes of MLflow, which take seconds to start
        }

    @property
    def credentials(self) -> dict[str, str]:
        """The variables of those who use it."""
        password = Secrets.kept(self.folder / "server").admin_password
        return {
            "MLFLOW_TRACKING_URI": self.uri,
            "MLFLOW_TRACKING_USERNAME": "admin",
            "MLFLOW_TRACKING_PASSWORD": password,
        }

    @property
    def uri_with_password(self) -> str:
        password = self.credentials["MLFLOW_TRACKING_PASSWORD"]
        return self.uri.replace("://", f"://admin:{password}@")

    def start(self) -> None:
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(self.project.root / "src" / "server.py")],
                env=self.project.environment() | self.variables,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_for(self.answers, 180)

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def answers(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        return "MLflow answers" in self.log.read_text()

    def call(
        self, path: str, user: str = "", password: str = "", body: dict | None = None
    ) -> bytes:
        said = b64encode(f"{user}:{password}".encode()).decode()
        headers = {"Authorization": f"Basic {said}"} if user else {}
        data = None
        if body is not None:
            data, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
        request = urllib.request.Request(f"{self.uri}{path}", data, headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.read()

    def stop(self, with_signal: int = signal.SIGTERM) -> int:
        """End the server as a service manager does; return its exit code."""
        self.process.send_signal(with_signal)
        return self.process.wait(60)

    def delete(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.stop()
        shutil.rmtree(self.folder)
        assert not postgres_of(self.folder), "PostgreSQL still runs"


def postgres_of(folder: Path) -> bool:
    """Return whether a process still has a folder on its command line."""
    found = subprocess.run(["pgrep", "-f", f"{folder}{os.sep}"], capture_output=True, text=True)
    return bool(found.stdout)
