"""The model registry: the gate, registration, the aliases."""

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from defect_detection import PipelineError, tracking
from defect_detection.classifier import Classifier
from defect_detection.settings import MLflowNames

if TYPE_CHECKING:
    import keras

log = logging.getLogger(__name__)

PRODUCTION_ALIAS = "prod"


@dataclass(frozen=True)
class Version:
    """A version of a registered model; `acc` is its test accuracy, in [0, 1]."""

    name: str
    number: int
    acc: float

    @property
    def uri(self) -> str:
        """The URI that MLflow loads it by."""
        return f"models:/{self.name}/{self.number}"


def gate(acc: float, names: MLflowNames) -> str:
    """Choose the registered model by the test accuracy: production from the threshold on."""
    if acc >= names.evaluation_threshold:
        return names.production_model_name
    return names.testing_model_name


def register(
    model_uri: str, run_id: str, acc: float, description: str, name: str, tags: dict[str, str]
) -> Version:
    """Register a logged model as a new version of `name`, tagged from the first moment.

    `tags` stand beside `acc`.
    """
    client = MlflowClient()
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    made = client.create_model_version(
        name,
        source=model_uri,
        run_id=run_id,
        tags={"acc": repr(acc)} | tags,
        description=description,
        model_id=model_uri.removeprefix("models:/"),
    )
    return Version(name, int(made.version), acc)


def versions(name: str) -> list[Version]:
    """Return the versions of a registered model that carry an accuracy, oldest first."""
    found = []
    for version in MlflowClient().search_model_versions(f"name = '{name}'"):
        try:
            found.append(Version(name, int(version.version), float(version.tags["acc"])))
        except (KeyError, ValueError):
            log.warning("%s version %s has no accuracy in its tag 'acc'", name, version.version)
    return sorted(found, key=lambda version: version.number)


def promote(names: MLflowNames) -> Version:
    """Point the production alias at the highest `acc`, at a tie at the newer version."""
    name = names.production_model_name
    return _point(name, PRODUCTION_ALIAS, lambda version: (version.acc, version.number))


def queue_for_retraining(names: MLflowNames) -> Version:
    """Point the testing alias at the newest version, which retraining starts from."""
    name, alias = names.testing_model_name, names.testing_model_alias
    return _point(name, alias, lambda version: version.number)


def _point(name: str, alias: str, key: Callable[[Version], Any]) -> Version:
    """Move an alias to the version with the highest key, in one step, and look again.

    Another process may register a better version between the look and the move. Each looks again
    after its own move, so whoever moves last has seen them all.
    """
    target = max(versions(name), key=key)
    while True:
        _set_alias(name, alias, target)
        best = max(versions(name), key=key)
        if best == target:
            return target
        target = best


def _set_alias(name: str, alias: str, version: Version, tries: int = 5) -> None:
    for left in reversed(range(tries)):
        try:
            return MlflowClient().set_registered_model_alias(name, alias, str(version.number))
        except MlflowException:
            # Two processes that set a new alias at the same moment both insert it, and the store
            # refuses the second.
            if left == 0:
                raise
            time.sleep(random.uniform(0.01, 0.1))


def production_version(names: MLflowNames) -> Version:
    """Return the version behind the production alias.

    Raises:
        PipelineError: there is none.
    """
    name = names.production_model_name
    found = behind_alias(name, PRODUCTION_ALIAS)
    if found is None:
        raise PipelineError(
            f"No version of {name} has the alias {PRODUCTION_ALIAS}. Run 'python src/train.py', "
            f"then 'python src/evaluation.py'; a test accuracy of "
            f"{names.evaluation_threshold:.0%} or more gets it"
        )
    return found


def behind_alias(name: str, alias: str) -> Version | None:
    """Return the version behind an alias, None if there is none."""
    try:
        found = MlflowClient().get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None
    return Version(name, int(found.version), float(found.tags.get("acc", "nan")))


def load_classifier(model_uri: str) -> Classifier:
    """Fetch a logged or registered model and load it for serving.

    Raises:
        PipelineError: its files are gone, or it has no LiteRT flavour.
    """
    with tracking.fetched(model_uri) as files:
        return Classifier.load(files)


def load_keras(model_uri: str, image_size: tuple[int, int]) -> "keras.Model":
    """Load a registered model for training, not compiled.

    Raises:
        PipelineError: it takes pictures of another size.
    """
    import mlflow.tensorflow  # imports TensorFlow

    model = mlflow.tensorflow.load_model(model_uri, keras_model_kwargs={"compile": False})
    size = model.input_shape[1:3]
    if size != tuple(image_size):
        raise PipelineError(
            f"{model_uri} takes pictures of {list(size)}, and image_size is {list(image_size)}: "
            f"set image_size in re_train/re_train.yaml to {list(size)}"
        )
    return model
