"""How many defects pass, by the random sample that people looked at."""

from defect_detection import PipelineError
from defect_detection.evaluation.metrics import Rate
from defect_detection.service.backend import Backend


def sampled(backend: Backend, model: str | None) -> Rate:
    """Return the defects among what passed and was judged by people, of a model or of all.

    Labels that cannot be read count as none: the line's page says so, and no page must stop.
    """
    try:
        found = backend.inbox.sample(model)
    except PipelineError:
        return Rate(0, 0)
    return Rate(found.defects, found.of)


def sampled_now(backend: Backend) -> Rate:
    """Return the sample of the model that judges."""
    model = backend.serving.model
    return sampled(backend, model.name if model else None)
