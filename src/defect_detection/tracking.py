"""MLflow experiments and runs: parameters, metrics, data set, artifacts, the model."""

import io
import json
import os
import re
import tempfile
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

# Before MLflow is imported, which reads them then.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # a plant's network has no way out
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
# A server that is away for half a minute is waited for; the default waits over four.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "4")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # for files of 1 MB
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # without git a run only lacks its commit

import mlflow  # noqa: E402
import sqlalchemy  # noqa: E402
from mlflow import MlflowClient  # noqa: E402
from mlflow.entities import Run  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402

from defect_detection import PipelineError, StoreError, pyfunc  # noqa: E402
from defect_detection.classifier import FLAVOUR, MODEL_FILE, SCOPE_FILE  # noqa: E402
from defect_detection.dataset import CLASSES, POSITIVE, Dataset  # noqa: E402
from defect_detection.files import replacing, require_writable  # noqa: E402
from defect_detection.metrics import OperatingPoint  # noqa: E402
from defect_detection.scope import Scope  # noqa: E402

if TYPE_CHECKING:
    import keras

CONNECT_SECONDS = 10
NEEDED = ("tensorflow", "keras", "numpy", *pyfunc.NEEDED)  # by a logged model
TRAINING_TAG = "training"  # the same on the runs of one call of train.py


@dataclass(frozen=True)
class BestModel:
    """What `train.py` leaves for `evaluation.py`, as a JSON file.

    Attributes:
        run_id: the training run.
        model_uri: the logged model, as MLflow loads it.
        val_accuracy: of the best epoch, in [0, 1].
        data_digest: of the training pictures.
        created_at: ISO 8601, UTC.
    """

    run_id: str
    model_uri: str
    val_accuracy: float
    data_digest: str
    created_at: str

    def write(self, path: Path) -> None:
        """Write the file; it is replaced whole or stays as it was."""
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> "BestModel":
        """Read the file.

        Raises:
            PipelineError: it is missing, damaged, or points at a run that is gone.
        """
        again = "Run 'python src/train.py'"
        try:
            best = cls(**json.loads(path.read_text()))
        except FileNotFoundError as error:
            raise PipelineError(f"{path} does not exist. {again} first") from error
        except (ValueError, TypeError) as error:
            raise PipelineError(f"{path} is damaged ({error}). {again} again") from error
        try:
            run = mlflow.get_run(best.run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            run = None
        if run is None or run.info.lifecycle_stage != "active":
            raise PipelineError(
                f"{path} points at the run {best.run_id}, which is not in the tracking store "
                f"{_without_password(mlflow.get_tracking_uri())}. {again} again"
            )
        return best


@contextmanager
def connected(uri: str, seconds: float = CONNECT_SECONDS) -> Iterator[None]:
    """Use the tracking store at `uri` inside the block; its errors come out in one line.

    Raises:
        StoreError: the store cannot be reached (within `seconds`), read or written.
    """
    if uri.startswith("file:"):
        # MLflow >= 3.13 refuses file stores unless told that they are meant.
        os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    _require_reachable(uri, seconds)
    mlflow.set_tracking_uri(uri)
    try:
        yield
    except (MlflowException, sqlalchemy.exc.SQLAlchemyError) as error:
        message = f"MLflow at {_without_password(uri)}: {_first_line(error)}"
        raise StoreError(message) from error


def _require_reachable(uri: str, seconds: float) -> None:
    """Find out at once what MLflow finds out after minutes of retries."""
    if uri.startswith(("http://", "https://")):
        try:
            urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=seconds).close()
        except urllib.error.HTTPError:
            pass  # it answers
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise StoreError(
                f"The tracking server {_without_password(uri)} does not answer ({reason}). Start "
                f"it, or set MLFLOW_TRACKING_URI in .env"
            ) from error
    elif (folder := _local_folder(uri)) is not None:
        require_writable(folder)
    else:
        try:
            sqlalchemy.create_engine(uri).connect().close()
        except (sqlalchemy.exc.SQLAlchemyError, ModuleNotFoundError) as error:
            raise StoreError(
                f"The database {_without_password(uri)} cannot be used ({_first_line(error)}). "
                f"Start it, or set MLFLOW_TRACKING_URI in .env"
            ) from error


def _local_folder(uri: str) -> Path | None:
    """Return the folder that holds a local store, None if the store is not local."""
    if uri.startswith("sqlite:///"):
        return Path(uri.removeprefix("sqlite:///")).parent
    if uri.startswith("file:"):
        return Path(urllib.request.url2pathname(uri.removeprefix("file://")))
    return None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _without_password(uri: str) -> str:
    return re.sub(r"//[^/@]*@", "//***@", uri)


def open_experiment(name: str) -> str:
    """Return the id of an experiment, made if there is none.

    Artifacts of a sqlite store go into `mlruns/` beside the database; MLflow would put them
    under the folder that the script happens to be started in.
    """
    existing = mlflow.get_experiment_by_name(name)
    if existing is None:
        uri = mlflow.get_tracking_uri()
        folder = _local_folder(uri) if uri.startswith("sqlite:") else None
        try:
            return mlflow.create_experiment(
                name, artifact_location=(folder / "mlruns").as_uri() if folder else None
            )
        except MlflowException:
            existing = mlflow.get_experiment_by_name(name)
            if existing is None:  # no other process was quicker: a real error
                raise
    if existing.lifecycle_stage != "active":
        raise PipelineError(
            f"The experiment {name} is deleted. Restore it with "
            f"'mlflow experiments restore --experiment-id {existing.experiment_id}'"
        )
    return existing.experiment_id


def log_dataset(data: Dataset, folder: Path, context: str) -> None:
    """Log where the pictures come from, their digest and counts; `context` as in MLflow."""
    with warnings.catch_warnings():  # of two classes of MLflow's own that fit a folder
        warnings.filterwarnings("ignore", "The specified dataset source can be interpreted")
        described = mlflow.data.from_numpy(
            data.images[:1],  # for the schema; the digest and the counts speak of all
            source=folder.as_uri(),
            name=folder.name,
            digest=data.digest[:16],
        )
    mlflow.log_input(described, context)
    mlflow.log_params(
        {f"{context}_{name}": count for name, count in data.counts.items()}
        | {f"{context}_digest": data.digest, f"{context}_skipped": len(data.skipped)}
    )


def log_model(
    model: "keras.Model",
    litert: bytes,
    quantize: str,
    point: OperatingPoint,
    scope: Scope,
    example: bytes,
) -> str:
    """Log a Keras model with its LiteRT form as a second flavour of the same MLflow model.

    `mlflow models serve` and `mlflow.pyfunc` run the LiteRT form, on encoded pictures (`pyfunc`);
    `mlflow.tensorflow.load_model` gives the Keras model.

    Args:
        model: takes float32 (n, height, width, 1) in [0, 255], gives (n, 1).
        litert: the same model as `model.to_litert` gives it.
        quantize: what its weights are kept as.
        point: how its probabilities are decided on.
        scope: which pictures it judges.
        example: a picture's bytes, kept as the input example.

    Returns:
        The URI of the logged model.
    """
    from mlflow.models import Model

    with redirect_stdout(io.StringIO()):
        logged = Model.log(
            None,
            SimpleNamespace(__name__=__name__, save_model=_save_model),
            name="model",
            model=model,
            litert=litert,
            quantize=quantize,
            point=point,
            scope=scope,
            input_example=pyfunc.table([example]),
            # Without these MLflow imports the model in a child process to find them: 8 to 10 s.
            pip_requirements=[f"{package}=={version(package)}" for package in NEEDED],
        )
    return logged.model_uri


def _save_model(
    path: str,
    mlflow_model: Any,
    model: "keras.Model",
    litert: bytes,
    quantize: str,
    point: OperatingPoint,
    scope: Scope,
    **options: Any,
) -> None:
    import mlflow.tensorflow

    # False: else it asks for one of tensors, or finds one by running the example.
    mlflow.tensorflow.save_model(model, path, mlflow_model=mlflow_model, signature=False, **options)
    (Path(path) / MODEL_FILE).write_bytes(litert)
    scope.save(Path(path) / SCOPE_FILE)
    mlflow_model.add_flavor(
        FLAVOUR,
        data=MODEL_FILE,
        image_size=list(model.input_shape[1:3]),
        class_names=list(CLASSES),
        positive_class=POSITIVE,
        quantize=quantize,
        operating_point=asdict(point),
        scope=SCOPE_FILE,
    )
    pyfunc.add(mlflow_model, Path(path))
    mlflow_model.save(str(Path(path) / "MLmodel"))


def training_runs(best: BestModel) -> list[Run]:
    """Return the runs of the training that `best` came out of, in their order."""
    run = mlflow.get_run(best.run_id)
    training = run.data.tags[TRAINING_TAG]
    return MlflowClient().search_runs(
        [run.info.experiment_id],
        f"tags.{TRAINING_TAG} = '{training}'",
        order_by=["attributes.start_time ASC"],
    )


def newest_evaluation(best: BestModel, experiment: str) -> Run:
    """Return the newest evaluation of a model.

    Raises:
        PipelineError: it was never evaluated.
    """
    found = MlflowClient().search_runs(
        [open_experiment(experiment)],
        f"tags.training_run_id = '{best.run_id}' and attributes.status = 'FINISHED'",
        max_results=1,
        order_by=["attributes.start_time DESC"],
    )
    if not found:
        raise PipelineError("The best model was not evaluated. Run 'python src/evaluation.py'")
    return found[0]


def history(run: Run, metric: str) -> list[float]:
    """Return a metric's values, epoch by epoch."""
    values = MlflowClient().get_metric_history(run.info.run_id, metric)
    return [value.value for value in sorted(values, key=lambda value: value.step)]


@contextmanager
def fetched(model_uri: str) -> Iterator[Path]:
    """Give a local folder with the files of a model, while the block lasts.

    Raises:
        PipelineError: the model's files are gone.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            files = mlflow.artifacts.download_artifacts(model_uri, dst_path=folder)
        except (MlflowException, OSError) as error:
            message = f"{model_uri}: its files cannot be had ({_first_line(error)})"
            raise PipelineError(message) from error
        yield Path(files)
