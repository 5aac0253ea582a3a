"""The connection to the tracking store, and what it says when that fails."""

import base64
import http.server
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

import hypothesis.strategies as st
import mlflow
import pytest
import sqlalchemy
from hypothesis import given, settings
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from conftest import ROOT
from defect_detection import PipelineError, StoreError
from defect_detection.registry import store as stores
from defect_detection.registry import versions


def test_artifacts_of_a_sqlite_store_lie_beside_it(store):
    experiment = mlflow.get_experiment(stores.open_experiment("train/test"))
    folder = Path(store.removeprefix("sqlite:///")).parent
    assert experiment.artifact_location.startswith(f"file://{folder}/mlruns")


def test_experiments_open_on_the_page_of_trainings(store):
    """Without this tag MLflow shows traces, of which there are none."""
    experiment = mlflow.get_experiment(stores.open_experiment("train/opened"))
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"


def test_opening_an_experiment_twice_gives_the_same(store):
    assert stores.open_experiment("train/twice") == stores.open_experiment("train/twice")


def test_deleted_experiment_is_refused_with_the_way_back(store):
    experiment = stores.open_experiment("train/deleted")
    mlflow.delete_experiment(experiment)
    with pytest.raises(PipelineError, match=f"restore --experiment-id {experiment}"):
        stores.open_experiment("train/deleted")


def test_server_that_is_not_there_is_told_at_once_and_without_its_password():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        uri = f"http://user:secret@127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(PipelineError, match="does not answer") as raised:
            with stores.connected(uri):
                pass
    assert "secret" not in str(raised.value)


def test_server_that_accepts_and_is_silent_is_given_up():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with pytest.raises(PipelineError, match="does not answer"):
            uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
            with stores.connected(uri, seconds=0.5):
                pass


@pytest.mark.parametrize("scheme", ["sqlite:///{}/mlflow.db", "file://{}"])
def test_store_that_cannot_be_written_is_named(tmp_path, scheme):
    (tmp_path / "file").write_text("in the way")
    uri = scheme.format(tmp_path / "file" / "below")
    with pytest.raises(PipelineError, match="cannot be (written|used)"):
        with stores.connected(uri, create=True):
            pass


def listing(folder: Path) -> list[tuple[str, int, int]]:
    """Return all files below a folder with their size and time."""
    found = ((path, path.lstat()) for path in sorted(folder.rglob("*")))
    return [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in found]


SCHEMES = ["sqlite:///{}/mlflow.db", "file://{}/mlruns"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_whoever_judges_never_makes_a_store(tmp_path, scheme):
    uri = scheme.format(tmp_path)
    with pytest.raises(StoreError, match=f"There is no tracking store at {uri}. Train") as raised:
        with stores.connected(uri):
            MlflowClient().search_registered_models()
    assert "\n" not in str(raised.value)
    assert listing(tmp_path) == []


def test_folder_with_other_things_is_no_store(tmp_path):
    (tmp_path / "0" / "model").mkdir(parents=True)
    before = listing(tmp_path)
    with pytest.raises(StoreError, match="There is no tracking store at file:"):
        with stores.connected(f"file://{tmp_path}"):
            MlflowClient().search_registered_models()
    assert listing(tmp_path) == before


def test_database_of_another_program_is_no_store(tmp_path):
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as other:
        other.execute("create table parts (name)")
    before = listing(tmp_path)
    with pytest.raises(StoreError, match="There is no tracking store at sqlite:"):
        with stores.connected(f"sqlite:///{tmp_path}/mlflow.db"):
            MlflowClient().search_registered_models()
    assert listing(tmp_path) == before


@pytest.mark.parametrize("scheme", SCHEMES)
def test_training_makes_a_store_and_says_where(tmp_path, scheme, caplog):
    """A mistyped URI would otherwise be a new store without a word."""
    uri = scheme.format(tmp_path)
    for _ in range(2):
        with stores.connected(uri, create=True):
            stores.open_experiment("train/test")
    (said,) = caplog.messages
    assert said == f"There was no tracking store at {uri}: a new, empty one is made"
    with stores.connected(uri):
        assert mlflow.get_experiment_by_name("train/test")


def fill(path: Path, content: bytes) -> None:
    path.write_bytes(content)


DAMAGE = {
    "empty": lambda path: fill(path, b""),
    "zeroed": lambda path: fill(path, bytes(path.stat().st_size)),
    "garbage": lambda path: fill(path, b"garbage" * 1000),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "cut": lambda path: fill(path, path.read_bytes()[:5000]),
    "zeroed behind its head": lambda path: fill(path, path.read_bytes()[:100] + bytes(99_000)),
}


@pytest.fixture(scope="session")
def sound(_store: str) -> Path:
    return Path(_store.removeprefix("sqlite:///"))


@pytest.mark.parametrize("create", [False, True])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_database_is_one_line_and_stays_as_it_is(sound, tmp_path, damage, create, capfd):
    path = tmp_path / "mlflow.db"
    shutil.copy(sound, path)
    DAMAGE[damage](path)
    before = listing(tmp_path)
    with pytest.raises(StoreError, match=str(path)) as raised:
        with stores.connected(f"sqlite:///{path}", seconds=1, create=create):
            stores.open_experiment("any")
    assert "\n" not in str(raised.value)
    assert listing(tmp_path) == before
    assert "Traceback" not in capfd.readouterr().err


def test_database_that_another_training_is_making_is_waited_for(sound, tmp_path):
    """SQLite makes the file first, and fills it at the first commit."""
    path = tmp_path / "mlflow.db"
    path.touch()

    def make() -> None:
        with closing(sqlite3.connect(sound)) as source, closing(sqlite3.connect(path)) as target:
            source.backup(target)

    made = threading.Timer(0.5, make)
    made.start()
    with stores.connected(f"sqlite:///{path}", create=True):
        assert MlflowClient().search_experiments()
    made.join()


READING = """
import sys
from defect_detection.registry import store, versions
with store.connected(sys.argv[1]):
    print(versions.in_production("Production_Reg"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlflow.db", "mlruns"])
def test_store_that_cannot_be_written_can_be_read(sound, tmp_path, name):
    folder = tmp_path / "store"
    folder.mkdir()
    if name == "mlflow.db":
        shutil.copy(sound, folder)
        uri = f"sqlite:///{folder}/mlflow.db"
    else:
        uri = f"file://{folder}/mlruns"
        with stores.connected(uri, create=True):
            stores.open_experiment("any")
            MlflowClient().search_registered_models()
    before = listing(folder)
    read_only = [folder, *folder.rglob("*")]
    for path in read_only:
        path.chmod(0o555)
    command = [*unprivileged(), sys.executable, "-c", READING, uri]
    done = subprocess.run(command, cwd=ROOT / "src", capture_output=True, text=True)
    for path in read_only:
        path.chmod(0o755)
    assert done.stdout == "None\n", done.stderr
    assert listing(folder) == before


@pytest.mark.slow
def test_database_that_turns_out_to_be_read_only_is_one_line(sound, tmp_path):
    """MLflow also logs such an error with its traceback."""
    shutil.copy(sound, tmp_path)
    (tmp_path / "mlflow.db").chmod(0o444)
    tmp_path.chmod(0o555)
    program = """
import sys
from defect_detection import cli
from defect_detection.registry import store
def main():
    with store.connected(sys.argv[1], create=len(sys.argv) > 2):
        store.open_experiment("new")
cli.run(main)
"""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    said = []
    for arguments in ([uri], [uri, "create"]):
        command = [*unprivileged(), sys.executable, "-c", program, *arguments]
        done = subprocess.run(command, cwd=ROOT / "src", capture_output=True, text=True)
        said += done.stderr.splitlines()
    tmp_path.chmod(0o755)
    assert len(said) == 2, said
    assert "readonly database" in said[0]
    assert "cannot be written" in said[1]


@pytest.mark.slow
def test_read_only_file_store_that_mlflow_would_write_to_is_lost(tmp_path):
    """MLflow makes folders that it misses, also in order to read."""
    uri = f"file://{tmp_path}/mlruns"
    with stores.connected(uri, create=True):
        stores.open_experiment("any")
    (tmp_path / "mlruns").chmod(0o555)
    command = [*unprivileged(), sys.executable, "-c", READING, uri]
    done = subprocess.run(command, cwd=ROOT / "src", capture_output=True, text=True)
    (tmp_path / "mlruns").chmod(0o755)
    assert done.stderr.splitlines()[-1].startswith(f"defect_detection.StoreError: MLflow at {uri}")


def unprivileged() -> list[str]:
    """Return a command that runs another one without root's right to write everywhere."""
    if os.geteuid():
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("root may write everywhere here")
    without = "-dac_override,-dac_read_search,-fowner"
    return ["setpriv", f"--bounding-set={without}", f"--inh-caps={without}"]


def test_reading_changes_nothing_in_the_folder_of_the_store(sound, tmp_path):
    shutil.copy(sound, tmp_path)
    before = listing(tmp_path)
    with stores.connected(f"sqlite:///{tmp_path}/mlflow.db"):
        assert versions.in_production("Production_Reg") is None
    assert listing(tmp_path) == before


@pytest.mark.slow
def test_training_waits_for_a_locked_store_and_judging_does_not(sound, tmp_path):
    shutil.copy(sound, tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    # MLflow itself waits five seconds when it opens a store, and twenty in the midst of work.
    with closing(sqlite3.connect(tmp_path / "mlflow.db", check_same_thread=False)) as other:
        other.execute("begin exclusive")
        with pytest.raises(StoreError, match="database is locked"):
            with stores.connected(uri, seconds=0.1):
                pass
        release = threading.Timer(8, other.rollback)
        release.start()
        with stores.connected(uri, seconds=0.1, create=True):
            stores.open_experiment("train/after the lock")
        release.join()


@pytest.mark.parametrize("uri", ["nonsense://user:secret@host/", "postgresql://u:secret@[::1]:1/x"])
def test_database_that_cannot_be_used_is_one_line_without_its_password(uri):
    with pytest.raises(PipelineError, match="cannot be used") as raised:
        with stores.connected(uri):
            pass
    assert "secret" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_error_of_mlflow_comes_out_in_one_line(_store):
    with pytest.raises(PipelineError, match="MLflow at sqlite:///.*not found") as raised:
        with stores.connected(_store):
            mlflow.get_run("0123456789abcdef0123456789abcdef")
    assert "\n" not in str(raised.value)


def test_driver_of_a_database_gets_the_password_as_it_is_meant(monkeypatch):
    """SQLAlchemy by itself takes the first @ for the end of a password."""
    asked: list[sqlalchemy.engine.URL] = []

    def create_engine(url: sqlalchemy.engine.URL, **_: object) -> None:
        asked.append(url)
        raise ValueError("enough")

    monkeypatch.setattr(sqlalchemy, "create_engine", create_engine)
    with pytest.raises(StoreError, match="cannot be used .enough"):
        with stores.connected("postgresql://kim:p@ss:w0rd/%@host:5432/mlflow"):
            pass
    (url,) = asked
    assert (url.username, url.password, url.host, url.port) == ("kim", "p@ss:w0rd/%", "host", 5432)


@pytest.fixture
def guarded(tracking_server):
    """A tracking server that asks for a user and a password, as a proxy before MLflow does."""
    right = "Basic " + base64.b64encode(b"kim:p@ss/w:rd").decode()
    asked: list[tuple[str, str | None]] = []

    class Guard(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers["Authorization"]))
            if self.headers["Authorization"] != right:
                return self.answer(401, b"You are not authenticated.\n")
            length = int(self.headers.get("Content-Length", 0))
            body = self.rfile.read(length) or None
            request = urllib.request.Request(tracking_server + self.path, body, method=self.command)
            request.add_header("Content-Type", self.headers.get("Content-Type", "text/plain"))
            try:
                with urllib.request.urlopen(request) as answer:
                    self.answer(answer.status, answer.read())
            except urllib.error.HTTPError as error:
                self.answer(error.code, error.read())

        do_POST = do_GET

        def answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Guard) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.asked = asked
        yield server
        server.shutdown()


@pytest.mark.parametrize("written", ["kim:p@ss/w:rd", "kim:p%40ss%2Fw%3Ard"])
def test_server_that_asks_for_a_password_gets_the_one_of_the_uri(guarded, written):
    address = f"127.0.0.1:{guarded.server_port}"
    with stores.connected(f"http://{written}@{address}"):
        assert versions.in_production("Nothing") is None
        assert mlflow.get_tracking_uri() == f"http://{address}"
    # And no other server gets it.
    guarded.asked.clear()
    with pytest.raises(StoreError) as raised:
        with stores.connected(f"http://{address}"):
            versions.in_production("Nothing")
    assert guarded.asked and all(header is None for _, header in guarded.asked)
    assert "MLFLOW_TRACKING_PASSWORD" in str(raised.value)


def test_wrong_password_is_one_line_without_it(guarded):
    with pytest.raises(StoreError, match="MLFLOW_TRACKING_USERNAME") as raised:
        with stores.connected(f"http://kim:wrong@127.0.0.1:{guarded.server_port}"):
            versions.in_production("Nothing")
    assert "wrong" not in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH_9.6\r\n", b""])
def test_what_listens_there_and_is_no_server_is_one_line(answer):
    def serve(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection:
            connection.recv(1000)
            connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, args=(listening,), daemon=True)
        thread.start()
        with pytest.raises(StoreError, match="does not answer"):
            with stores.connected(f"http://127.0.0.1:{listening.getsockname()[1]}"):
                pass
        thread.join(20)


@pytest.mark.parametrize("uri", ["http://host:port", "http://", "http://a b", "https://[::1"])
def test_address_that_is_none_is_one_line(uri):
    with pytest.raises(StoreError, match="does not answer"):
        with stores.connected(uri):
            pass


LETTERS = st.characters(max_codepoint=0x2FF, exclude_categories=("C", "Z"))
PASSWORDS = st.text(LETTERS, min_size=1, max_size=12)
# What libraries say: MLflow about a URL, drivers about a connection, SQLAlchemy about a URI.
SAID = [
    lambda uri, password: MlflowException(f"API request to {uri}/api failed: {password!r}"),
    lambda uri, password: sqlalchemy.exc.OperationalError(
        "connect", {}, RuntimeError(f'FATAL: password "{password}" of kim is wrong, see {uri}')
    ),
    lambda uri, password: MlflowException(""),
]


@pytest.mark.slow
@settings(max_examples=40)
@given(PASSWORDS, st.sampled_from(SAID))
def test_no_error_shows_a_password(password, said):
    """All passwords give the same message, but for what looks like one of them."""

    def messages(secret: str) -> list[str]:
        found = []
        for scheme in ("http", "nonsense", "postgresql"):
            written = quote(secret, safe="@:")
            uri = f"{scheme}://kim:{written}@127.0.0.1:1/x?password={quote(secret, safe='')}"
            with pytest.raises(StoreError) as raised:
                with stores.connected(uri):
                    pass
            found.append(str(raised.value))
        return found

    def raised_inside(secret: str) -> str:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stores, "require_server", lambda *_: None)
            uri = f"http://kim:{quote(secret, safe='@:')}@127.0.0.1:1"
            with pytest.raises(StoreError) as raised:
                with stores.connected(uri):
                    raise said(uri, secret)
        return str(raised.value)

    control = "Qk7-control-Zx9"
    shown_for = {one: [*messages(one), raised_inside(one)] for one in (password, control)}
    for shown, expected in zip(shown_for[password], shown_for[control], strict=True):
        assert "kim" not in shown.partition("@127")[0]
        assert "\n" not in shown
        if len(password) > 3:
            assert password not in shown
        pairs = zip(shown.split(), expected.split(), strict=True)
        assert all(a == b or "***" in a for a, b in pairs), (shown, expected)
