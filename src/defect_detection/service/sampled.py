"""How many defects pass, by the random sample that people looked at."""

import logging
from dataclasses import dataclass

from defect_detection import PipelineError
from defect_detection.evaluation.metrics import Rate
from defect_detection.service.backend import Backend

log = logging.getLogger("api")


@dataclass(frozen=True)
class Sampled:
    """The sample of a model.

    Attributes:
        rate: defects among the images that passed and were judged by people.
        trouble: why it is not known, "" if it is.
    """

    rate: Rate
    trouble: str


def sampled(backend: Backend, model: str | None) -> Sampled:
    """Return the sample of a model, None for all; labels that cannot be read stop no page."""
    try:
        found = backend.inbox.sample(model)
    except PipelineError as error:
        return Sampled(Rate(0, 0), str(error))
    return Sampled(Rate(found.defects, found.of), "")


def sampled_now(backend: Backend) -> Sampled:
    """Return the sample of the model that judges."""
    model = backend.serving.model
    return sampled(backend, model.name if model else None)
