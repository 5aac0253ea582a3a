"""The connection to MLflow's tracking store."""

import http.client
import logging
import os
import re
import sqlite3
import stat
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from urllib.parse import quote

import mlflow
import requests
import sqlalchemy
from mlflow.environment_variables import MLFLOW_TRACKING_PASSWORD, MLFLOW_TRACKING_USERNAME
from mlflow.exceptions import MlflowException

from defect_detection import PipelineError, StoreError, names, uris
from defect_detection.atomic import require_writable
from defect_detection.uris import without_password

log = logging.getLogger(__name__)

CONNECT_SECONDS = 10
LOCKED_SECONDS = 90  # how long writers wait for another one
USUAL_PATIENCE = 5  # seconds
SQLITE_HEAD = b"SQLite format 3\0"
ANOTHER = "or set MLFLOW_TRACKING_URI in .env"
FORBIDDEN = "PERMISSION_DENIED"  # error code of a server, for what only others may do
# What comes from MLflow when the store does not answer, or refuses something.
FAILURES = (MlflowException, sqlalchemy.exc.SQLAlchemyError, OSError, StoreError)

# It logs errors with a traceback, and raises them too.
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


# Seconds that a call waits while a sqlite store is locked, None as long as nobody asked for more.
_patience: float | None = None


@sqlalchemy.event.listens_for(sqlalchemy.Pool, "checkout")
def _wait_for_writers(connection: object, *_: object) -> None:
    if isinstance(connection, sqlite3.Connection):
        connection.execute(f"PRAGMA busy_timeout = {int(1000 * (_patience or USUAL_PATIENCE))}")


@contextmanager
def patience(seconds: float = LOCKED_SECONDS) -> Iterator[None]:
    """Wait longer for other writers of a sqlite store in the block.

    A training waits less, since what it writes is also kept on disk and can be delivered later.
    """
    global _patience
    before, _patience = _patience, seconds
    try:
        yield
    finally:
        _patience = before


@contextmanager
def connected(uri: str, seconds: float = CONNECT_SECONDS, create: bool = False) -> Iterator[None]:
    """Use the tracking store at `uri` inside the block, and turn its errors into StoreError.

    Args:
        uri: of the store; that of a server may hold a user and a password.
        seconds: within which the store must answer.
        create: for whoever fits models: the store must be writable, and one that is not there is
            made, which is then said.

    Raises:
        StoreError: the store is not there, cannot be reached (within `seconds`), read or written.
    """
    bare, user, password = uris.split(uri)
    if uris.is_server(uri):
        require_server(uri, seconds)
        _tell_mlflow(user, password)
        local = None
    else:
        bare = uris.joined(bare, user, password)  # drivers need it percent-encoded
        local = _local_folder(bare)
        _require_store(bare, local, seconds, create)
    mlflow.set_tracking_uri(bare)
    try:
        yield
    except (MlflowException, sqlalchemy.exc.SQLAlchemyError) as error:
        raise StoreError(_explain(error, uri)) from error
    except requests.RequestException as error:
        raise StoreError(_explain(error, uri)) from error
    except OSError as error:  # of a folder store, which MLflow also writes to in order to read
        files = local if bare.startswith("file:") else None
        if files is None or not str(error.filename).startswith(str(files)):
            raise
        raise StoreError(_explain(error, uri)) from error


def connected_name() -> str:
    """Return the name of the connected store, as `uris.name` gives it."""
    return uris.name(mlflow.get_tracking_uri())


def require_server(uri: str, seconds: float = CONNECT_SECONDS) -> None:
    """Raise StoreError at once; MLflow itself would raise only after minutes of retries."""
    # Without the password: that the server answers is all that counts here.
    address = re.split("[?#]", uris.split(uri)[0])[0].rstrip("/")
    try:
        urllib.request.urlopen(f"{address}/health", timeout=seconds).close()
    except urllib.error.HTTPError:
        pass  # the server answers
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        why = reason if isinstance(reason, Exception) else RuntimeError(reason)
        raise StoreError(
            f"The tracking server {without_password(uri)} does not answer "
            f"({first_line(why, uri)}). Start it, {ANOTHER}"
        ) from error


def _tell_mlflow(user: str, password: str) -> None:
    """Give MLflow user and password in its variables: it shows those in a URI in its errors."""
    for variable, value in ((MLFLOW_TRACKING_USERNAME, user), (MLFLOW_TRACKING_PASSWORD, password)):
        if user and password:
            variable.set(value)
        else:
            variable.unset()  # those of a store before this one


def _require_store(uri: str, local: Path | None, seconds: float, create: bool) -> None:
    """Raise StoreError unless there is a store, or `create` allows to make one."""
    shown = without_password(uri)
    if create and local is not None:
        require_writable(local)
    try:
        if uri.startswith("file:"):
            # MLflow >= 3.13 refuses file stores unless this variable allows them.
            os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
            assert local is not None
            there = local.exists() and any((one / "meta.yaml").exists() for one in local.iterdir())
        else:
            there = _has_tables(uri, seconds, create)
    except (sqlalchemy.exc.SQLAlchemyError, OSError, ImportError, ValueError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise StoreError(
            f"The store {shown} cannot be used ({reason or first_line(error, uri)}). Start or "
            f"repair it, {ANOTHER}"
        ) from error
    if not there and not create:
        raise StoreError(
            f"There is no tracking store at {shown}. Train a model with src/train.py, {ANOTHER}"
        )
    if not there:
        log.warning("There was no tracking store at %s: a new, empty one is made", shown)


def _has_tables(uri: str, seconds: float, create: bool) -> bool:
    """Return whether a database holds a store of MLflow; nothing is created.

    Raises:
        OSError: the file of the database cannot be read.
        ValueError: it is no database.
    """
    url, options = sqlalchemy.engine.make_url(uri), {}
    if url.get_backend_name() == "sqlite":
        path = Path(url.database or "")
        if not _is_database(path, seconds if create else 0):
            return False
        if create and not os.access(path, os.W_OK):
            raise PermissionError(0, "it is read-only")
        connect = partial(sqlite3.connect, f"file:{quote(str(path))}?mode=rw", uri=True)
        options["creator"] = connect
    engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool, **options)
    waits = LOCKED_SECONDS if create else _patience or seconds
    with patience(waits), engine.connect() as connection:
        return sqlalchemy.inspect(connection).has_table("alembic_version")


def _is_database(path: Path, patience: float) -> bool:
    """Return whether there is a file, which is then a SQLite database.

    Args:
        path: of the file.
        patience: seconds in which an empty file may become one, since another process makes it.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise ValueError("it is no file")
            with path.open("rb") as file:
                head = file.read(len(SQLITE_HEAD))
        except FileNotFoundError:
            return False
        if head == SQLITE_HEAD:
            return True
        if head or time.monotonic() > deadline:
            raise ValueError("file is not a database" if head else "file is empty")
        time.sleep(0.1)


def _local_folder(uri: str) -> Path | None:
    """Return the folder that holds a local store, None if the store is not local."""
    if uri.startswith(uris.SQLITE):
        return Path(sqlalchemy.engine.make_url(uri).database or "").parent
    if uri.startswith("file:"):
        return Path(urllib.request.url2pathname(uri.removeprefix("file://")))
    return None


def _explain(error: Exception, uri: str) -> str:
    said = f"MLflow at {without_password(uri)}: {first_line(error, uri)}"
    if isinstance(error, MlflowException) and error.get_http_status_code() == 401:
        said += ". Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in .env.local"
    return said


def first_line(error: Exception, uri: str | None = None) -> str:
    """Return the first line of an error's message, without passwords.

    Args:
        error: its message may be empty; then its kind is returned.
        uri: of the store that it is about; None is the connected one.
    """
    said = names.first_line(error)
    return uris.scrubbed(said, mlflow.get_tracking_uri() if uri is None else uri)


# MLflow's page of an experiment then begins with its runs.
KIND, TRAINING = "mlflow.experimentKind", "custom_model_development"


def open_experiment(name: str) -> str:
    """Return the id of an experiment; create the experiment if it does not exist.

    Artifacts of a sqlite store go into `mlruns/` beside the database. MLflow's default is the
    folder in which the script happens to be started.

    Raises:
        PipelineError: the experiment was deleted.
    """
    existing = mlflow.get_experiment_by_name(name)
    if existing is None:
        uri = mlflow.get_tracking_uri()
        folder = _local_folder(uri) if uri.startswith("sqlite:") else None
        try:
            return mlflow.create_experiment(
                name,
                artifact_location=(folder / "mlruns").as_uri() if folder else None,
                tags={KIND: TRAINING},
            )
        except MlflowException:
            existing = mlflow.get_experiment_by_name(name)
            if existing is None:  # not a race with another process
                raise
    if existing.lifecycle_stage != "active":
        raise PipelineError(
            f"The experiment {name} is deleted. Restore it with "
            f"'mlflow experiments restore --experiment-id {existing.experiment_id}'"
        )
    return existing.experiment_id
