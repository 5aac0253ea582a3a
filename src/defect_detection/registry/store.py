"""The connection to MLflow's tracking store."""

import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
import sqlalchemy
from mlflow.exceptions import MlflowException

from defect_detection import PipelineError, StoreError
from defect_detection.atomic import require_writable

CONNECT_SECONDS = 10


@contextmanager
def connected(uri: str, seconds: float = CONNECT_SECONDS) -> Iterator[None]:
    """Use the tracking store at `uri` inside the block, and turn its errors into StoreError.

    Raises:
        StoreError: the store cannot be reached (within `seconds`), read or written.
    """
    if uri.startswith("file:"):
        # MLflow >= 3.13 refuses file stores unless this variable allows them.
        os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    require_reachable(uri, seconds)
    mlflow.set_tracking_uri(uri)
    try:
        yield
    except (MlflowException, sqlalchemy.exc.SQLAlchemyError) as error:
        message = f"MLflow at {without_password(uri)}: {first_line(error)}"
        raise StoreError(message) from error


def require_reachable(uri: str, seconds: float = CONNECT_SECONDS) -> None:
    """Raise StoreError at once; MLflow itself would raise only after minutes of retries."""
    if uri.startswith(("http://", "https://")):
        try:
            urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=seconds).close()
        except urllib.error.HTTPError:
            pass  # the server answers
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise StoreError(
                f"The tracking server {without_password(uri)} does not answer ({reason}). Start "
                f"it, or set MLFLOW_TRACKING_URI in .env"
            ) from error
    elif (folder := _local_folder(uri)) is not None:
        require_writable(folder)
    else:
        try:
            sqlalchemy.create_engine(uri).connect().close()
        except (sqlalchemy.exc.SQLAlchemyError, ModuleNotFoundError) as error:
            raise StoreError(
                f"The database {without_password(uri)} cannot be used ({first_line(error)}). "
                f"Start it, or set MLFLOW_TRACKING_URI in .env"
            ) from error


def _local_folder(uri: str) -> Path | None:
    """Return the folder that holds a local store, None if the store is not local."""
    if uri.startswith("sqlite:///"):
        return Path(uri.removeprefix("sqlite:///")).parent
    if uri.startswith("file:"):
        return Path(urllib.request.url2pathname(uri.removeprefix("file://")))
    return None


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return str(error).strip().splitlines()[0]


def without_password(uri: str) -> str:
    """Return a URI with the user and password masked."""
    return re.sub(r"//[^/@]*@", "//***@", uri)


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
