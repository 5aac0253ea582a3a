"""What the API works with, as one value."""

from dataclasses import dataclass

from defect_detection.dataset.inbox import Inbox
from defect_detection.inference.verdict_log import VerdictLog
from defect_detection.service.access import Access
from defect_detection.service.changes import Changes
from defect_detection.service.health import StoreWatch
from defect_detection.service.jobs import Jobs
from defect_detection.service.label_photographs import LabelPhotographs
from defect_detection.service.serving import Serving
from defect_detection.service.store_desk import StoreDesk
from defect_detection.service.verdicts import Verdicts
from defect_detection.settings import Line


@dataclass(frozen=True)
class Backend:
    """What the API works with.

    Attributes:
        access: who may do what.
        jobs: the retrainings.
        store: what is known of the tracking store.
        serving: the model in production.
        log: to which verdicts are written.
        verdicts: the same, to be read.
        inbox: the labels that people gave.
        changes: the log of what people change.
        photographs: which labels are about one photograph.
        desk: asks the tracking store.
        registered_model: the one whose versions go into production.
        line: how verdicts are shown and reviewed.
    """

    access: Access
    jobs: Jobs
    store: StoreWatch
    serving: Serving
    log: VerdictLog
    verdicts: Verdicts
    inbox: Inbox
    changes: Changes
    photographs: LabelPhotographs
    desk: StoreDesk
    registered_model: str
    line: Line
