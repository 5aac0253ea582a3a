"""Registers an evaluated model: decide where it goes, describe it, carry it out."""

import math
from dataclasses import dataclass, replace
from typing import Protocol

from defect_detection.evaluation.metrics import Comparison
from defect_detection.evaluation.release import Registration, Release, judge
from defect_detection.evaluation.result import Evaluation
from defect_detection.pipeline import record
from defect_detection.pipeline.champions import Champions, tested_on
from defect_detection.registry import promotion, saved_model, versions
from defect_detection.registry.promotion import Election
from defect_detection.registry.versions import (
    EVALUATED_BY,
    IMAGES,
    LITERT,
    NOT_RELEASED,
    PRODUCTION_ALIAS,
    QUALIFIED,
    RELEASED,
    SET_ASIDE,
    TAKES,
    TEST_DIGEST,
    UNFINISHED,
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
        set_aside: why it waits for a person, "" if it need not.
    """

    name: str
    champion: Version | None
    comparison: Comparison | None
    qualified: bool
    release: Release
    unlike: str
    set_aside: str

    @property
    def may_move(self) -> bool:
        """Whether the version takes part in the choice of the one that has the alias.

        If not, the champion is not scored again either.
        """
        return self.release.released and not self.unlike and not self.set_aside

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


def decide(
    model: LoggedModel, evaluation: Evaluation, champions: Champions, rules: Rules
) -> Decision:
    """Decide by the test accuracy and by the comparison with the champion on the same images."""
    name = versions.gate(evaluation.scores.accuracy, rules.names)
    challenger = Version(name, 0, 0.0, identity(model, evaluation), model.model_uri)
    champion = versions.in_production(rules.names.production_model_name)
    unlike, comparison = "", None
    if champion is not None:
        unlike = challenger.unlike(champion) or champions.out_of_reach(champion)
        comparison = None if unlike else champions.compare(champion, evaluation)
    # A champion that cannot be run is replaced by any version; one that was not compared is not.
    better = comparison.verdict == "better" if comparison is not None else not unlike
    return Decision(
        name=name,
        champion=champion,
        comparison=comparison,
        qualified=rules.decisions.promotion != "significant" or better,
        release=judge(evaluation, rules.decisions, rules.names.evaluation_threshold),
        unlike=unlike,
        set_aside=promotion.why_set_aside(name, challenger),
    )


def register(
    model: LoggedModel, evaluation: Evaluation, champions: Champions, rules: Rules
) -> tuple[Version, Decision]:
    """Register a logged model under the name that its test accuracy earns.

    Until `release` is called, the version is not released, so that an evaluation that ends before
    its report leaves nothing that could get the alias.
    """
    decision = decide(model, evaluation, champions, rules)
    description, tags = describe(model, evaluation, decision)
    version = versions.register(
        model.model_uri,
        model.run_id,
        evaluation.scores.accuracy,
        description,
        decision.name,
        tags | {RELEASED: "false", NOT_RELEASED: UNFINISHED},
    )
    champions.add(version, evaluation)
    return version, decision


def foresee(
    version: Version, decision: Decision, champions: Champions, rules: Rules
) -> Registration:
    """Return what `carry_out` is going to do, for the report that must exist before.

    The champion is scored again if that is necessary to tell.
    """
    if decision.name == rules.names.testing_model_name:
        return _registration(version, decision, _queued(version, version, rules.names), False)
    first = decision.champion
    if decision.may_move:
        coming = _with_tags(version, _release_tags(decision))
        _, first = _election(version, champions).result(coming)
    return _promoted(version, decision, first, rules)


def carry_out(
    version: Version, decision: Decision, champions: Champions, rules: Rules
) -> Registration:
    """Release a version, if it is to be, and move the alias, if the rules say so."""
    versions.set_tags(version, _release_tags(decision))
    version = _with_tags(version, _release_tags(decision))
    if decision.name == rules.names.testing_model_name:
        queued = versions.queue_for_retraining(rules.names)
        return _registration(version, decision, _queued(version, queued, rules.names), False)
    first = decision.champion
    if decision.may_move:
        first = promotion.promote(_election(version, champions), rules.by)
    return _promoted(version, decision, first, rules)


def describe(
    model: LoggedModel, evaluation: Evaluation, decision: Decision
) -> tuple[str, dict[str, str]]:
    """Return the description and the tags of the version beside `acc`."""
    description = (
        f"{evaluation.summary()} {evaluation.split.leaked_share:.1%} of the images come "
        f"from photographs of training; {evaluation.unseen}. Validation accuracy "
        f"{model.val_accuracy:.4f}."
    )
    tags = evaluation.tags() | identity(model, evaluation)
    tags[saved_model.CHECKSUM] = saved_model.checksum(model.model_uri)
    if decision.comparison is not None:
        tags["comparison"] = decision.compared()
    if not decision.qualified:
        tags[QUALIFIED] = "false"
    if decision.set_aside:
        tags[SET_ASIDE] = "true"
    tags[EVALUATED_BY] = record.run_id()
    return description, tags


def _release_tags(decision: Decision) -> dict[str, str]:
    released = decision.release.released
    why_not = "" if released else "; ".join(decision.release.reasons)
    return {NOT_RELEASED: why_not, RELEASED: str(released).lower()}


def _with_tags(version: Version, tags: dict[str, str]) -> Version:
    return replace(version, tags={**version.tags, **tags})


def identity(model: LoggedModel, evaluation: Evaluation) -> dict[str, str]:
    """Return the tags by which versions of other products, data or models are told apart."""
    own = {
        TAKES: str(evaluation.takes),
        IMAGES: evaluation.split.sketch,
        LITERT: evaluation.litert_sha256,
    }
    return own | tested_on(evaluation) | record.lineage(model.run_id)


def _election(version: Version, champions: Champions) -> Election:
    return Election(version.name, version.tags[TEST_DIGEST], champions.update)


def _registration(
    version: Version, decision: Decision, said: str, in_production: bool
) -> Registration:
    return Registration(
        version, decision.champion, decision.comparison, decision.release, said, in_production
    )


def _queued(version: Version, queued: Version, names: MLflowNames) -> str:
    return (
        f"Registered as {version.name} version {version.number}, below the test accuracy of "
        f"{names.evaluation_threshold:.0%}; {names.testing_model_alias} is version {queued.number}"
    )


def _promoted(
    version: Version, decision: Decision, first: Version | None, rules: Rules
) -> Registration:
    """Say which version has the alias, `first`, and why."""
    said = f"Registered as {version.name} version {version.number}"
    released, here = decision.release.released, first is not None and first.number == version.number
    if not released:
        said += ", not released"
    if first is None:
        said += f"; no version has the alias {PRODUCTION_ALIAS}"
    else:
        said += f"; {PRODUCTION_ALIAS} is version {first.number} with "
        known = f"a test accuracy of {first.acc:.4f}"
        said += "an unknown test accuracy" if math.isnan(first.acc) else known
    why = decision.unlike or decision.set_aside
    if why and not here:
        said += f", and stays: {why}" if first is not None else f", since {why}"
        if released:
            said += f". A person may decide: {rules.promote} --version {version.number}"
    elif not decision.qualified and not here:
        said += ", since only a version that is significantly better replaces it"
    elif first is not None and released and not here and first.acc == version.acc:
        said += ", and stays, since this one is not better"
    return _registration(version, decision, said, here)
