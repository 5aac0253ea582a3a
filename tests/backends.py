"""A backend of the API for tests: real parts, in a folder of the test's own."""

import os
import sys
from dataclasses import replace
from pathlib import Path

from flask.testing import FlaskClient

from defect_detection.dataset.inbox import Inbox
from defect_detection.inference.judge import NamedModel
from defect_detection.inference.verdict_log import Rules, VerdictLog
from defect_detection.service.access import Access, Role
from defect_detection.service.app import create_app
from defect_detection.service.backend import Backend
from defect_detection.service.changes import Changes
from defect_detection.service.health import StoreWatch
from defect_detection.service.jobs import Jobs
from defect_detection.service.label_photographs import LabelPhotographs
from defect_detection.service.serving import Serving
from defect_detection.service.store_desk import StoreDesk
from defect_detection.service.verdicts import Verdicts
from defect_detection.settings import Line

LOCAL = {"REMOTE_ADDR": "127.0.0.1"}
OTHER = {"REMOTE_ADDR": "192.168.0.7"}
MODEL = "Production_Reg/1"


def backend(
    folder: Path,
    tokens: dict[Role, str] | None = None,
    store: StoreWatch | None = None,
    model: Path | None = None,
    rules: Rules | None = None,
) -> Backend:
    """Return a backend whose jobs end at once; with a model, it judges."""
    uri = f"sqlite:///{folder}/mlflow.db"
    store = store or StoreWatch(uri, "Production_Reg")
    serving = Serving(lambda: None, store)  # never begun
    if model is not None:
        serving.model, serving.trouble = NamedModel.load(MODEL, str(model)), ""
    line = Line()
    rules = rules or replace(Rules.of(line), audit_share=0.0)
    inbox = Inbox(folder / "data")
    return Backend(
        access=Access(tokens or {}, "0123456789abcdef" * 4, line.shifts),
        jobs=Jobs(folder / "jobs", [sys.executable, "-c", "pass"], folder, 60, os.environ),
        store=store,
        serving=serving,
        log=VerdictLog(folder / "line", rules),
        verdicts=Verdicts(folder / "line", line.shifts),
        inbox=inbox,
        changes=Changes(folder / "line"),
        photographs=LabelPhotographs(inbox, folder / "cache"),
        desk=StoreDesk(uri),
        registered_model="Production_Reg",
        line=line,
    )


def client(made: Backend, address: dict[str, str] = LOCAL) -> FlaskClient:
    """Return a client of the application that calls from an address."""
    found = create_app(made).test_client()
    found.environ_base = {**found.environ_base, **address}
    return found
