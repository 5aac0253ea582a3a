"""Evaluates a logged model, registers it and writes the report."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from defect_detection import PipelineError, cli
from defect_detection.dataset.inbox import Inbox
from defect_detection.dataset.split import Split
from defect_detection.evaluation import parity, release, report, robustness
from defect_detection.evaluation.metrics import Rate
from defect_detection.evaluation.release import Registration
from defect_detection.evaluation.report import Origin
from defect_detection.evaluation.result import Evaluation, evaluate
from defect_detection.pipeline import record, tell
from defect_detection.pipeline.champions import Champions
from defect_detection.pipeline.register import LoggedModel, Rules, carry_out, foresee, register
from defect_detection.registry import saved_model
from defect_detection.registry.versions import Version
from defect_detection.runtime.classifier import Classifier
from defect_detection.runtime.decision import ACCURACY_THRESHOLD

log = logging.getLogger(__name__)


class Outcome(Protocol):
    """Who waits for what is registered."""

    def prepare(self, registry: str, version: int, acc: float) -> None:
        """Take the room for the result, before the alias moves."""

    def result(self, registry: str, version: int, acc: float) -> None:
        """Report the result."""


@dataclass(frozen=True)
class EvaluationPlan:
    """How a model is evaluated.

    Attributes:
        rules: what its registration goes by.
        prefix: precedes the names of the figures in a run that has training figures too.
        outcome: is told what is registered, if a job waits for that.
    """

    rules: Rules
    prefix: str = ""
    outcome: Outcome | None = None


def evaluate_and_register(
    model: LoggedModel, classifier: Classifier, split: Split, plan: EvaluationPlan
) -> Version:
    """Evaluate a logged model on the test images, register it and log the report.

    Args:
        model: where it was logged.
        classifier: its LiteRT form, loaded.
        split: the images.
        plan: how.

    Raises:
        PipelineError: the LiteRT form does not judge as the Keras model does.
    """
    evaluation = evaluate(classifier, split)
    record.evaluation(evaluation, plan.prefix)
    tell.evaluation(evaluation)
    _require_parity(model, classifier, evaluation)
    champions = Champions(split)
    version, decision = register(model, evaluation, champions, plan.rules)
    record.version(version, decision.compared(), decision.comparison)
    tell.comparison(decision.compared())
    log_report = _reporting(model, classifier, evaluation, plan)
    foreseen = foresee(version, decision, champions, plan.rules)
    uri = log_report(foreseen)
    registered = version.name, version.number, version.acc
    if plan.outcome is not None:
        plan.outcome.prepare(*registered)
    with cli.uninterrupted():
        done = carry_out(version, decision, champions, plan.rules)
        if plan.outcome is not None:
            plan.outcome.result(*registered)
    tell.decision(done.decision)
    record.decision(done.decision)
    if done.decision != foreseen.decision:  # another evaluation moved the alias meanwhile
        log_report(done)
    tell.report(uri)
    if not done.release.released:
        tell.diagnosis(release.diagnosis(evaluation, done.release, uri))
    return done.version


def _reporting(
    model: LoggedModel, classifier: Classifier, evaluation: Evaluation, plan: EvaluationPlan
) -> Callable[[Registration], str]:
    """Return a function that logs the report with a registration and returns where it is."""
    found = robustness.measure(classifier, evaluation.split.testing)
    origin = Origin(record.run_id(), record.commit(), *record.training(model.run_id))
    table = report.table(evaluation)

    def log(registration: Registration) -> str:
        decisions = plan.rules.decisions
        line = _at_the_line(registration, evaluation)
        page = report.html(evaluation, registration, found, decisions, origin, line)
        return record.page(page, table)

    return log


def _at_the_line(registration: Registration, evaluation: Evaluation) -> Rate:
    """Return the defects among the parts that the champion passed, by the random sample."""
    champion = registration.champion
    if champion is None:
        return Rate(0, 0)
    inbox = Inbox(evaluation.split.testing.folder.path)
    try:
        found = inbox.sample(f"{champion.name}/{champion.number}")
    except PipelineError as error:  # for one sentence of the report, nothing must end
        log.warning("The report says nothing of the line: %s", error)
        return Rate(0, 0)
    return Rate(found.defects, found.of)


def _require_parity(model: LoggedModel, classifier: Classifier, evaluation: Evaluation) -> None:
    keras = saved_model.load_keras(model.model_uri)
    images = evaluation.split.testing.images_as(classifier.takes)
    thresholds = (classifier.point.threshold, ACCURACY_THRESHOLD)
    found = parity.compare(keras, images, evaluation.probabilities, thresholds)
    record.parity(found)
    tell.parity(found)
    quantize = classifier.quantize
    if not found.within(quantize):
        raise PipelineError(
            f"Not registered, since LiteRT does not judge as Keras does: {found}; with quantize: "
            f"{quantize} {parity.TOLERANCES[quantize]:g} and no flip are allowed. "
            + ("" if quantize == "none" else "Set quantize: none in src/config.yaml. ")
            + "Train again"
        )
