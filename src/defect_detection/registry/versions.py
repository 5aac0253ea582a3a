"""Versions of registered models: the gate, registration, tags and aliases."""

import logging
import math
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from defect_detection import sketch
from defect_detection.registry import store
from defect_detection.settings import MLflowNames

log = logging.getLogger(__name__)

PRODUCTION_ALIAS = "prod"
# Tags of a version.
QUALIFIED, SET_ASIDE = "qualified", "set_aside"
RELEASED, NOT_RELEASED = "released", "not_released"  # the second says why not
UNFINISHED = "its evaluation did not end"  # that is why, until its report exists
EVALUATED_BY = "evaluation_run"
TAKES = "takes"  # the pixels that its model takes, in words
IMAGES = "images"  # a sketch of the images that it was trained and tested on
TEST_DIGEST = "test_digest"  # of the images that `acc` was measured on
TESTED = "test_photographs"  # how many of each class `acc` was measured on
LITERT = "litert_sha256"  # of its LiteRT model
PARENT = "parent_model"  # URI of the logged model that it was fine-tuned from
TRAINED = "training_digest"  # of the images that it was trained on

# The tag `acc`, as `repr` writes a number from 0 to 1; and its first digits, the highest first.
_WRITTEN = re.compile(r"[01](\.\d*)?|\d(\.\d+)?e-(0[5-9]|[1-9]\d+)", re.ASCII)
_FALLING = ("1", *(f"0.{digits}" for digits in (99, 98, 97, 96, 95, 9, 8)), "")


@dataclass(frozen=True)
class Version:
    """A version of a registered model.

    Attributes:
        name: of the registered model.
        number: of the version, from 1.
        acc: its test accuracy, in [0, 1].
        tags: all tags of the version in MLflow.
        source: URI of the logged model; no two versions have the same.
    """

    name: str
    number: int
    acc: float
    tags: Mapping[str, str] = field(default_factory=dict)
    source: str = ""

    @property
    def uri(self) -> str:
        """The URI by which MLflow loads it."""
        return f"models:/{self.name}/{self.number}"

    @property
    def test_digest(self) -> str | None:
        """Digest of the test images on which `acc` was measured."""
        return self.tags.get(TEST_DIGEST)

    @property
    def qualified(self) -> bool:
        """Whether the configured rule lets it get the production alias."""
        return self.tags.get(QUALIFIED) != "false"

    @property
    def released(self) -> bool:
        """Whether it may go into production; versions from before that rule may."""
        return self.tags.get(RELEASED) != "false"

    @property
    def why_not_released(self) -> str:
        """Why it is not released, in words."""
        return self.tags.get(NOT_RELEASED, "")

    def unlike(self, other: "Version") -> str:
        """Return why it cannot replace another version by an accuracy, "" if it can.

        A version that lacks a tag, as it is from before there were any, is like any other; but an
        accuracy on other images counts only if it is known on how many photographs it rests.
        """
        ours, theirs = self.tags.get(TAKES), other.tags.get(TAKES)
        if ours and theirs and ours != theirs:
            return f"it takes images of {ours}, version {other.number} of {theirs}"
        ours, theirs = self.tags.get(TESTED), other.tags.get(TESTED, "an unknown number")
        if ours and self.test_digest != other.test_digest and _fewer(ours, theirs):
            return (
                f"it was tested on {ours} photographs, and the accuracy of version {other.number} "
                f"rests on {theirs}"
            )
        ours, theirs = self.tags.get(IMAGES), other.tags.get(IMAGES)
        if ours and theirs and not sketch.share(ours, theirs):
            return (
                f"its data has no image in common with that of version {other.number}; for "
                f"another product set product in src/config.yaml"
            )
        return ""

    def repeats(self, other: "Version") -> str:
        """Return how this version repeats another one, "" if it does not."""
        if self.source and self.source == other.source:
            return "the same model as"
        if self.tags.get(LITERT) and self.tags.get(LITERT) == other.tags.get(LITERT):
            return "a model with the same weights as"
        same_images = self.tags.get(TRAINED) == other.tags.get(TRAINED, "unknown")
        if same_images and other.source and self.tags.get(PARENT) == other.source:
            return "fine-tuned, on the same images, from"
        return ""

    @property
    def set_aside(self) -> bool:
        """Whether a person moved the alias away from it or past it."""
        return self.tags.get(SET_ASIDE) == "true"


def tested(photographs: Mapping[str, int]) -> str:
    """Return the value of the tag `TESTED` for the number of photographs of each class."""
    return ", ".join(f"{count} {name}" for name, count in photographs.items())


def _fewer(ours: str, theirs: str) -> bool:
    """Return whether a tag `TESTED` has fewer photographs of a class than another, or may have."""
    own, known = (re.findall(r"(\d+) ", described) for described in (ours, theirs))
    alike = len(own) == len(known)
    return not alike or any(int(a) < int(b) for a, b in zip(own, known, strict=True))


def gate(acc: float, names: MLflowNames) -> str:
    """Return the registered model for a test accuracy: production at the threshold or above."""
    if acc >= names.evaluation_threshold:
        return names.production_model_name
    return names.testing_model_name


def register(
    model_uri: str, run_id: str, acc: float, description: str, name: str, tags: dict[str, str]
) -> Version:
    """Register a logged model as a new version of `name`.

    Args:
        model_uri: of the logged model.
        run_id: the run that logged it.
        acc: its test accuracy, which becomes the tag `acc`.
        description: of the version.
        name: of the registered model, created if it does not exist.
        tags: more tags of the version; it has them from its creation on.
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
    return Version(name, int(made.version), acc, made.tags, model_uri)


def with_accuracy(name: str) -> list[Version]:
    """Return the versions of a registered model that have the tag `acc`, oldest first."""
    return _with_accuracy(name, f"name = '{name}'")


def highest(name: str, digest: str, wanted: Callable[[Version], bool]) -> Version | None:
    """Return the wanted version with the highest `acc`, the newest of equal ones.

    MLflow needs a millisecond for each version that it returns, so those with high accuracies are
    asked for first, by the first digits of the tag.

    Args:
        name: of the registered model.
        digest: of the test images; versions that were tested on others are not looked at.
        wanted: whether a version comes into question.
    """
    tested = f"name = '{name}' and tags.{TEST_DIGEST} = '{digest}'"
    for digits in _FALLING:
        found = filter(wanted, _with_accuracy(name, f"{tested} and tags.acc LIKE '{digits}%'"))
        best = max(found, key=lambda version: (version.acc, version.number), default=None)
        if best is not None and best.acc >= float(digits or 0):
            return best
    return None


def those_set_aside(name: str) -> list[Version]:
    """Return the versions that a person moved the alias away from or past, oldest first."""
    return _with_accuracy(name, f"name = '{name}' and tags.{SET_ASIDE} = 'true'")


def _with_accuracy(name: str, wanted: str) -> list[Version]:
    found = []
    for version in _search(wanted):
        acc = _accuracy(version.tags)
        if acc is None:
            _warn_of(name, version.version)
            continue
        found.append(Version(name, int(version.version), acc, version.tags, version.source))
    return sorted(found, key=lambda version: version.number)


def _search(wanted: str) -> Iterator[ModelVersion]:
    token = None
    while True:  # a page has 10,000
        page = MlflowClient().search_model_versions(wanted, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def half_registered(evaluation: str = "") -> list[Version]:
    """Return the versions of evaluations that did not end: of one, by the id of its run, or all."""
    of_one = f"tags.`{EVALUATED_BY}` = '{evaluation}'"
    found = map(_read, _search(of_one if evaluation else f"tags.{RELEASED} = 'false'"))
    return [one for one in found if not one.released and one.why_not_released in ("", UNFINISHED)]


def withdraw(version: Version) -> str:
    """Delete a half registered version, or call it so for good; return what was done, in words.

    On a server, only who made a registered model may delete a version.
    """
    try:
        MlflowClient().delete_model_version(version.name, str(version.number))
    except MlflowException as error:
        if error.error_code == store.FORBIDDEN:
            set_tags(version, {NOT_RELEASED: "its evaluation did not end, and will not"})
            return "is never released"
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # the answer to the first call was lost
            raise
    return "is deleted"


@cache
def _warn_of(name: str, number: str) -> None:  # once
    log.warning("%s version %s has no accuracy in its tag 'acc'", name, number)


def set_tags(version: Version, tags: Mapping[str, str]) -> None:
    """Set tags of a version. None is ever deleted: on a server, only its maker may do that."""
    client, number = MlflowClient(), str(version.number)
    for tag, value in tags.items():
        retry(client.set_model_version_tag, version.name, number, tag, value)


def update(version: Version, acc: float, tags: Mapping[str, str], description: str) -> None:
    """Replace a version's figures by those measured on other test images.

    If the process dies in between, the version has no digest of test images, so its figures count
    for none.
    """
    client = MlflowClient()
    set_tags(version, {TEST_DIGEST: ""})
    client.update_model_version(version.name, str(version.number), description)
    set_tags(version, {"acc": repr(acc)} | {k: v for k, v in tags.items() if k != TEST_DIGEST})
    set_tags(version, {TEST_DIGEST: tags[TEST_DIGEST]})


def set_alias(version: Version, alias: str) -> None:
    """Move an alias to a version, atomically."""
    number = str(version.number)
    retry(MlflowClient().set_registered_model_alias, version.name, alias, number)


def retry(call: Callable[..., None], *arguments: str, tries: int = 5) -> None:
    """Make a call that sets an alias or a tag; again if another process sets it at that moment."""
    for left in reversed(range(tries)):
        try:
            return call(*arguments)
        except MlflowException:
            # If two processes set a new alias or tag at the same moment, both insert a row, and
            # the store refuses the second.
            if left == 0:
                raise
            time.sleep(random.uniform(0.01, 0.1))


def queue_for_retraining(names: MLflowNames) -> Version:
    """Point the testing alias at the newest version, from which retraining starts.

    Another process may register a newer version between the query and the move. Each process
    queries again after its move, so the last one to move has seen all versions.
    """
    target = None
    while True:
        newest = with_accuracy(names.testing_model_name)[-1]
        if target is not None and newest.number == target.number:
            return target
        set_alias(newest, names.testing_model_alias)
        target = newest


def in_production(name: str) -> Version | None:
    """Return the version with the alias `prod`, None if there is none."""
    return with_alias(name, PRODUCTION_ALIAS)


def with_alias(name: str, alias: str) -> Version | None:
    """Return the version of a registered model that has an alias, None if there is none."""
    try:
        found = MlflowClient().get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None
    return _read(found)


def numbered(name: str, number: int) -> Version:
    """Return a version by its number."""
    return _read(MlflowClient().get_model_version(name, str(number)))


def _read(found: ModelVersion) -> Version:
    """Return a version as MLflow has it; its accuracy is NaN if nobody can read it."""
    acc = _accuracy(found.tags)
    known = math.nan if acc is None else acc
    return Version(found.name, int(found.version), known, found.tags, found.source)


def _accuracy(tags: Mapping[str, str]) -> float | None:
    """Return the tag `acc`, which anyone may edit in MLflow; None if it is no accuracy."""
    text = tags.get("acc", "")
    acc = float(text) if _WRITTEN.fullmatch(text) else math.nan
    return acc if 0 <= acc <= 1 else None
