"""Models in the store: log one, fetch its files, load it for serving or for training.

A logged model has two forms. `mlflow.tensorflow.load_model` returns the Keras model; evaluation,
inference and `mlflow models serve` run the LiteRT form, whose files `runtime.model_files` owns.
"""

import io
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from defect_detection import PipelineError, StoreError, runtime
from defect_detection.registry import store
from defect_detection.registry.store import first_line
from defect_detection.runtime import checksums, native_output
from defect_detection.runtime.classifier import Classifier
from defect_detection.runtime.model_files import FLAVOUR, ServedModel
from defect_detection.runtime.pyfunc import COLUMN

if TYPE_CHECKING:
    import keras
    from mlflow.models import Model

# What a logged model needs beside the copied `runtime`.
RUNTIME_PACKAGES = ("ai-edge-litert", "numpy", "pillow", "pyyaml")
PACKAGES = ("tensorflow", "keras", *RUNTIME_PACKAGES)
CODE = "code"  # MLflow's name for the folder
KERAS_FILE = "data/model.keras"  # MLflow's names
CHECKSUM = "sha256"  # tag of a logged model and of a version: that of its file of checksums
# The same for versions of all times, so that one process can load several of them.
LOADER = "defect_detection.pyfunc"


def log(model: "keras.Model", served: ServedModel, example: bytes) -> str:
    """Log a Keras model and its LiteRT form as one MLflow model of the active run.

    Args:
        model: takes float32 (n, height, width, channels) in [0, 255], returns (n, 1).
        served: its LiteRT form and what decides about its probabilities.
        example: content of an image file, kept as the input example.

    Returns:
        The URI of the logged model.
    """
    import pandas as pd
    from mlflow.models import Model

    written: list[str] = []

    def save(path: str, **options: Any) -> None:
        written.append(_save(path, **options))

    with redirect_stdout(io.StringIO()):
        logged = Model.log(
            None,
            SimpleNamespace(__name__=__name__, save_model=save),
            name="model",
            model=model,
            served=served,
            input_example=pd.DataFrame({COLUMN: [example]}),
            # Without these MLflow imports the model in a child process to find them: 8 to 10 s.
            pip_requirements=[f"{package}=={version(package)}" for package in PACKAGES],
            # Else MLflow might write MLmodel once more, after its checksum was taken.
            validate_serving_input=False,
        )
    MlflowClient().set_logged_model_tags(logged.model_id, {CHECKSUM: written[0]})
    return logged.model_uri


def logged_by(run_id: str) -> str:
    """Return the URI of the model that a run logged, "" if it logged none.

    A model of which only a part was logged, since the process was killed then, is deleted if this
    user may delete it.
    """
    client = MlflowClient()
    experiment = client.get_run(run_id).info.experiment_id
    models = client.search_logged_models([experiment], f"source_run_id = '{run_id}'")
    for model in models:
        if CHECKSUM not in model.tags:  # it is set last
            try:
                client.delete_logged_model(model.model_id)
            except MlflowException as error:
                if error.error_code != store.FORBIDDEN:
                    raise
    return next((one.model_uri for one in models if CHECKSUM in one.tags), "")


def _save(
    path: str,
    mlflow_model: "Model",
    model: "keras.Model",
    served: ServedModel,
    validate_serving_input: bool,
    **options: Any,
) -> str:
    """Save a model as MLflow's flavours do; return the SHA-256 of its checksums."""
    import mlflow.pyfunc
    import mlflow.tensorflow

    # False, since MLflow would demand a signature of tensors or run the example to find one.
    mlflow.tensorflow.save_model(model, path, mlflow_model=mlflow_model, signature=False, **options)
    folder = Path(path)
    mlflow_model.add_flavor(FLAVOUR, **served.save(folder))
    _copy_code(folder / CODE)
    _set_signature(mlflow_model)
    mlflow.pyfunc.add_to_model(
        mlflow_model,
        loader_module=LOADER,
        code=CODE,
        conda_env="conda.yaml",
        python_env="python_env.yaml",
    )
    mlflow_model.save(str(folder / "MLmodel"))
    return checksums.write(folder)


def _copy_code(folder: Path) -> None:
    """Copy the loader and the package `runtime`, which run where this project is not installed."""
    source = Path(runtime.__path__[0])
    package = source.parent
    copied = folder / package.name / source.name
    shutil.copytree(source, copied, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("__init__.py", "pyfunc.py"):
        shutil.copy(package / name, copied.parent)


def _set_signature(model: "Model") -> None:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema

    outputs = [
        ColSpec(DataType.string, "verdict"),
        ColSpec(DataType.double, "probability", required=False),
        ColSpec(DataType.boolean, "review"),
        ColSpec(DataType.string, "reason"),
    ]
    model.signature = ModelSignature(Schema([ColSpec(DataType.binary, COLUMN)]), Schema(outputs))


@contextmanager
def fetched(model_uri: str) -> Iterator[Path]:
    """Yield a local folder with the files of a model; it is deleted after the block.

    The files are those that were saved: each is compared with its checksum, and the checksums with
    the tag of the model or the version. Models from before there were checksums have neither.

    Raises:
        StoreError: the files cannot be fetched, or are not those that were saved.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            expected = checksum(model_uri)
            files = Path(mlflow.artifacts.download_artifacts(model_uri, dst_path=folder))
            checksums.verify(files, expected)
        except (MlflowException, OSError) as error:
            message = f"{model_uri}: its files cannot be fetched ({first_line(error)})"
            raise StoreError(message) from error
        except ValueError as error:
            raise StoreError(
                f"{model_uri}: its files in the store are damaged ({error}). Restore them, or "
                f"train a new model"
            ) from error
        yield files


def checksum(model_uri: str) -> str:
    """Return the SHA-256 of the checksums of a logged or registered model, "" if it has none."""
    if not model_uri.startswith("models:/"):  # a folder
        return ""
    client, name = MlflowClient(), model_uri.removeprefix("models:/")
    if "/" not in name:
        return str(client.get_logged_model(name).tags.get(CHECKSUM, ""))
    return str(client.get_model_version(*name.rsplit("/", 1)).tags.get(CHECKSUM, ""))


def load_classifier(model_uri: str) -> Classifier:
    """Fetch a logged or registered model and load it for serving.

    Raises:
        PipelineError: its files cannot be fetched, or it has no LiteRT form.
    """
    with fetched(model_uri) as files:
        return Classifier.load(files)


def load_keras(model_uri: str) -> "keras.Model":
    """Load a logged or registered model for training, not compiled.

    Keras reads its file in safe mode, and nothing else of the model is read: MLflow would unpickle
    `custom_objects.cloudpickle` and import what `code/` holds, and so run whatever was put there.

    Raises:
        PipelineError: its files cannot be fetched, or its Keras file is damaged, not safe or newer
            than Keras.
    """
    native_output.silence_tensorflow()
    import keras

    with fetched(model_uri) as files:
        try:
            file = files / KERAS_FILE
            return keras.saving.load_model(file, compile=False, safe_mode=True)
        # Keras raises all of these for a file that is damaged, asks for code to be run or was
        # written by a newer version.
        except Exception as error:
            older = sys.version_info < (3, 11)
            hint = ", or use Python 3.11 or 3.12, which have a newer Keras" if older else ""
            raise PipelineError(
                f"{model_uri}: its Keras model cannot be read by Keras {keras.__version__}, since "
                f"it is damaged, not safe or newer ({first_line(error)}). Train a new one{hint}"
            ) from error
