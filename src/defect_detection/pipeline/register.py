"""Registers an evaluated model: decide where it goes, describe it, carry it out."""

from dataclasses import dataclass
from typing import Protocol

from defect_detection.evaluation.metrics import Comparison
from defect_detection.evaluation.release import Registration, Release, judge
from defect_detection.evaluation.result import Evaluation
from defect_detection.pipeline import record
from defect_detection.pipeline.champions import Champions
from defect_detection.registry import promotion, versions
from defect_detection.registry.versions import (
    EVALUATED_BY,
    IMAGES,
    NOT_RELEASED,
    PRODUCTION_ALIAS,
    QUALIFIED,
    RELEASED,
    TAKES,
    Version,
)
from defect_detection.settings import Decisions, MLflowNames


class LoggedModel(Protocol):
    """A model that training logged."""

    @property
    def run_id(self) -> str:
        """The training run."""

    @property
    def model_uri(self) -> str:
        """The logged model, as MLflow loads it."""

    @property
    def val_accuracy(self) -> float:
        """Accuracy on held-out photographs, in [0, 1]."""


@dataclass(frozen=True)
class Rules:
    """What a registration goes by.

    Attributes:
        names: of the registered models, and the accuracy that production takes.
        decisions: what a version must show to get the alias.
        by: the user or the CI run that registers.
        promote: the call of promote.py for the same product, for messages.
    """

    names: MLflowNames
    decisions: Decisions
    by: str
    promote: str = "python src/promote.py"


@dataclass(frozen=True)
class Decision:
    """Where an evaluated model goes.

    Attributes:
        name: of the registered model that gets it as a new version.
        champion: the version that has the alias prod now, None if none has.
        comparison: with the champion, None if there is none or it cannot be run.
        qualified: whether the rule `promotion` lets the version get the alias.
        release: whether it is released.
        unlike: why it cannot be compared with the champion, "" if it can.
    """

    name: str
    champion: Version | None
    comparison: Comparison | None
    qualified: bool
    release: Release
    unlike: str

    def compared(self) -> str:
        """Return the comparison with the champion in words."""
        if self.champion is None:
            return "There was no version in production to compare with."
        known = f"{self.champion.name} version {self.champion.number} ({PRODUCTION_ALIAS})"
        if self.unlike:
            return f"Not compared with {known}: {self.unlike}."
        if self.comparison is None:
            return f"{known} was not compared, since it cannot be run."
        return f"Compared with {known}: {self.comparison}"


def decide(evaluation: Evaluation, champions: Champions, rules: Rules) -> Decision:
    """Decide by the test accuracy and by the comparison with the champion on the same images."""
    champion = versions.in_production(rules.names.production_model_name)
    unlike = comparison = None
    if champion is not None:
        unlike = Version("", 0, 0.0, data_tags(evaluation)).unlike(champion)
        comparison = None if unlike else champions.compare(champion, evaluation)
    better = comparison is None or comparison.verdict == "better"
    return Decision(
        name=versions.gate(evaluation.scores.accuracy, rules.names),
        champion=champion,
        comparison=comparison,
        qualified=rules.decisions.promotion != "significant" or better,
        release=judge(evaluation, rules.decisions, rules.names.evaluation_threshold),
        unlike=unlike or "",
    )


def register(
    model: LoggedModel, evaluation: Evaluation, champions: Champions, rules: Rules
) -> tuple[Version, Decision]:
    """Register a logged model under the name that its test accuracy earns."""
    decision = decide(evaluation, champions, rules)
    description, tags = describe(model, evaluation, decision)
    version = versions.register(
        model.model_uri,
        model.run_id,
        evaluation.scores.accuracy,
        description,
        decision.name,
        tags,
    )
    return version, decision


def move_alias(
    version: Version,
    decision: Decision,
    evaluation: Evaluation,
    champions: Champions,
    rules: Rules,
) -> Registration:
    """Move the alias of a version's registered model, if the rule says so."""
    if decision.name == rules.names.testing_model_name:
        said, in_production = _queue(version, rules.names), False
    else:
        champions.add(version, evaluation)
        said, in_production = _promote(version, decision, champions, rules)
    return Registration(
        version, decision.champion, decision.comparison, decision.release, said, in_production
    )


def describe(
    model: LoggedModel, evaluation: Evaluation, decision: Decision
) -> tuple[str, dict[str, str]]:
    """Return the description and the tags of the version beside `acc`."""
    description = (
        f"{evaluation.summary()} {evaluation.split.leaked_share:.1%} of the images come "
        f"from photographs of training; {evaluation.unseen}. Validation accuracy "
        f"{model.val_accuracy:.4f}."
    )
    tags = evaluation.tags() | data_tags(evaluation)
    if decision.comparison is not None:
        tags["comparison"] = decision.compared()
    if not decision.qualified:
        tags[QUALIFIED] = "false"
    tags[EVALUATED_BY] = record.run_id()
    tags[RELEASED] = str(decision.release.released).lower()
    if not decision.release.released:
        tags[NOT_RELEASED] = "; ".join(decision.release.reasons)
    return description, tags


def data_tags(evaluation: Evaluation) -> dict[str, str]:
    """Return the tags by which versions of different products are told apart."""
    return {TAKES: str(evaluation.takes), IMAGES: evaluation.split.sketch}


def _queue(version: Version, names: MLflowNames) -> str:
    queued = versions.queue_for_retraining(names)
    return (
        f"Registered as {version.name} version {version.number}, below the test accuracy of "
        f"{names.evaluation_threshold:.0%}; {names.testing_model_alias} is version {queued.number}"
    )


def _promote(
    version: Version, decision: Decision, champions: Champions, rules: Rules
) -> tuple[str, bool]:
    first = decision.champion
    if not decision.unlike:  # else the champion would be scored again on another product
        digest = version.tags["test_digest"]
        first = promotion.promote(version.name, digest, champions.update, rules.by)
    said = f"Registered as {version.name} version {version.number}"
    if not version.released:
        said += ", not released"
    if first is None:
        return f"{said}; no version has the alias {PRODUCTION_ALIAS}", False
    said += (
        f"; {PRODUCTION_ALIAS} is version {first.number} with a test accuracy of {first.acc:.4f}"
    )
    if decision.unlike:
        said += f", and stays: {decision.unlike}"
        if version.released:
            said += f". A person may decide: {rules.promote} --version {version.number}"
    elif not version.qualified:
        said += ", since only a version that is significantly better replaces it"
    return said, first.number == version.number
