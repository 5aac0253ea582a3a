"""The model registry: the gate, registration, the aliases."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from defect_detection import PipelineError
from defect_detection.settings import MLflowNames

log = logging.getLogger(__name__)


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


def register(model_uri: str, run_id: str, acc: float, description: str, name: str) -> Version:
    """Register a logged model as a new version of `name`, tagged `acc` from the first moment."""
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
        tags={"acc": repr(acc)},
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
    name, alias = names.production_model_name, names.production_model_alias
    return _point(name, alias, lambda version: (version.acc, version.number))


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
        MlflowClient().set_registered_model_alias(name, alias, str(target.number))
        best = max(versions(name), key=key)
        if best == target:
            return target
        target = best


def production_version(names: MLflowNames) -> Version:
    """Return the version behind the production alias.

    Raises:
        PipelineError: there is none.
    """
    name, alias = names.production_model_name, names.production_model_alias
    try:
        found = MlflowClient().get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise PipelineError(
            f"No version of {name} has the alias {alias}. Run 'python src/train.py', then "
            f"'python src/evaluation.py'; a test accuracy of {names.evaluation_threshold:.0%} "
            f"or more gets it"
        ) from error
    return Version(name, int(found.version), float(found.tags["acc"]))
