"""The model registry: the gate, registration, the aliases."""

import logging
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from defect_detection import PipelineError, tracking
from defect_detection.classifier import Classifier
from defect_detection.settings import MLflowNames

if TYPE_CHECKING:
    import keras

log = logging.getLogger(__name__)

PRODUCTION_ALIAS = "prod"
QUALIFIED, SET_ASIDE = "qualified", "set_aside"  # tags of a version


@dataclass(frozen=True)
class Version:
    """A version of a registered model.

    Attributes:
        name: of the registered model.
        number: of the version, from 1.
        acc: its test accuracy, in [0, 1].
        tags: what else is known of it, as MLflow keeps it.
        source: where it was logged, which no two versions share.
    """

    name: str
    number: int
    acc: float
    tags: Mapping[str, str] = field(default_factory=dict)
    source: str = ""

    @property
    def uri(self) -> str:
        """The URI that MLflow loads it by."""
        return f"models:/{self.name}/{self.number}"

    @property
    def test_digest(self) -> str | None:
        """Digest of the test pictures that `acc` was measured on."""
        return self.tags.get("test_digest")

    @property
    def qualified(self) -> bool:
        """Whether the configured rule lets it have the alias of production."""
        return self.tags.get(QUALIFIED) != "false"

    @property
    def set_aside(self) -> bool:
        """Whether a person moved the alias away from it, or past it."""
        return self.tags.get(SET_ASIDE) == "true"


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
    return Version(name, int(made.version), acc, made.tags)


def versions(name: str) -> list[Version]:
    """Return the versions of a registered model that carry an accuracy, oldest first."""
    found = []
    for version in MlflowClient().search_model_versions(f"name = '{name}'"):
        try:
            acc = float(version.tags["acc"])
        except (KeyError, ValueError):
            log.warning("%s version %s has no accuracy in its tag 'acc'", name, version.version)
            continue
        found.append(Version(name, int(version.version), acc, version.tags))
    return sorted(found, key=lambda version: version.number)


def set_tags(version: Version, tags: Mapping[str, str | None]) -> None:
    """Change tags of a version; None takes one away."""
    client, number = MlflowClient(), str(version.number)
    for tag, value in tags.items():
        if value is not None:
            _insist(client.set_model_version_tag, version.name, number, tag, value)
        elif tag in version.tags:
            _insist(client.delete_model_version_tag, version.name, number, tag)


def update(version: Version, acc: float, tags: Mapping[str, str], description: str) -> None:
    """Give a version figures that were measured on other test pictures.

    Whoever is cut off leaves it without a digest of test pictures: its figures are then of none.
    """
    client = MlflowClient()
    set_tags(version, {"test_digest": ""})
    client.update_model_version(version.name, str(version.number), description)
    set_tags(version, {"acc": repr(acc)} | {k: v for k, v in tags.items() if k != "test_digest"})
    set_tags(version, {"test_digest": tags["test_digest"]})


def set_alias(version: Version, alias: str) -> None:
    """Move an alias to a version, in one step."""
    number = str(version.number)
    _insist(MlflowClient().set_registered_model_alias, version.name, alias, number)


def _insist(call: Callable[..., None], *arguments: str, tries: int = 5) -> None:
    for left in reversed(range(tries)):
        try:
            return call(*arguments)
        except MlflowException:
            # Two processes that set a new alias or tag at the same moment both insert it, and
            # the store refuses the second.
            if left == 0:
                raise
            time.sleep(random.uniform(0.01, 0.1))


def queue_for_retraining(names: MLflowNames) -> Version:
    """Point the testing alias at the newest version, which retraining starts from.

    Another process may register a newer one between the look and the move. Each looks again after
    its own move, so whoever moves last has seen them all.
    """
    target = None
    while True:
        newest = versions(names.testing_model_name)[-1]
        if target is not None and newest.number == target.number:
            return target
        set_alias(newest, names.testing_model_alias)
        target = newest


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
    acc = float(found.tags.get("acc", "nan"))
    return Version(name, int(found.version), acc, found.tags, found.source)


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
    import defect_detection.model  # noqa: F401, I001  quietens TensorFlow, which is imported here
    import mlflow.tensorflow

    model = mlflow.tensorflow.load_model(model_uri, keras_model_kwargs={"compile": False})
    size = model.input_shape[1:3]
    if size != tuple(image_size):
        raise PipelineError(
            f"{model_uri} takes pictures of {list(size)}, and image_size is {list(image_size)}: "
            f"set image_size in re_train/re_train.yaml to {list(size)}"
        )
    return model
