"""The API and the pages: verdicts, the line, the review, labels, models, retrainings.

    POST   /predict            judge images
    GET    /line, /review, /labels, /models, /jobs
    POST   /retrain            start a retraining; JSON with epochs, batch_size, learning_rate
    GET    /retrain            the newest jobs; ?limit=50&before=<id> for others
    GET    /retrain/<id>       state, progress, result
    GET    /retrain/<id>/log   its output
    DELETE /retrain/<id>       cancel it
    GET    /health             version in production, model, store, running job
    GET    /metrics            for Prometheus
    GET    /openapi.json       all calls

With API_TOKEN, changes need 'Authorization: Bearer <token>'; without it they are accepted from this
machine only. OPERATOR_TOKEN may judge and label, VIEW_TOKEN look.
"""

import argparse
import gc
import logging
import os
import re
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "src"))

from defect_detection import PipelineError, cli, locks, settings  # noqa: E402
from defect_detection.dataset.inbox import Inbox  # noqa: E402
from defect_detection.inference.production import Production  # noqa: E402
from defect_detection.inference.verdict_log import Rules, VerdictLog  # noqa: E402
from defect_detection.service import health, logs, memory, server  # noqa: E402
from defect_detection.service.access import Access, Role, secret_in  # noqa: E402
from defect_detection.service.app import create_app  # noqa: E402
from defect_detection.service.backend import Backend  # noqa: E402
from defect_detection.service.changes import Changes  # noqa: E402
from defect_detection.service.jobs import Jobs  # noqa: E402
from defect_detection.service.label_photographs import LabelPhotographs  # noqa: E402
from defect_detection.service.serving import Serving  # noqa: E402
from defect_detection.service.store_desk import StoreDesk  # noqa: E402
from defect_detection.service.verdicts import Verdicts  # noqa: E402
from defect_detection.settings import RetrainConfig  # noqa: E402

log = logging.getLogger("api")

LOG_WITHIN = 2  # seconds, at the end
ASK_EVERY = 3600  # seconds; the API's own looks at the store tell when the alias moves
FIRST_LOOK = 2.5  # seconds to wait at most for the first look at the store


def main() -> None:
    """Read options and settings, then serve until stopped."""
    env = settings.environment()
    options = arguments(env)
    logs.set_up(options.log)
    memory.give_back()
    if options.pid_file:
        hold(options.pid_file)
    configured = settings.read_yaml(ROOT / "re_train" / "re_train.yaml", RetrainConfig)
    config = settings.read_config()
    names, uri = configured.mlflow.of(config.product), settings.tracking_uri(env)
    registered = names.production_model_name
    environment = dict(os.environ)
    os.environ.update(health.MLFLOW_LIMITS)  # of this process only: the jobs have their copy
    store = health.StoreWatch(uri, registered)
    cache = settings.from_root(config.paths.cache)
    asking = partial(Production, uri, registered, cache, names.testing_model_name, ASK_EVERY)
    serving = Serving(asking, store)
    serving.begin()
    command = [sys.executable, str(ROOT / "re_train" / "re_train.py")]
    folder = settings.line_folder(env, config)
    inbox = Inbox(settings.from_root(env.get("DATA_PATH", configured.paths.data_path)))
    line = config.line
    backend = Backend(
        access=Access(tokens(env), secret_in(folder), line.shifts),
        jobs=Jobs(settings.from_root(options.jobs), command, ROOT, options.time_limit, environment),
        store=store,
        serving=serving,
        log=VerdictLog(folder, Rules.of(line)),
        verdicts=Verdicts(folder, line.shifts),
        inbox=inbox,
        changes=Changes(folder),
        photographs=LabelPhotographs(inbox, cache),
        desk=StoreDesk(uri),
        registered_model=registered,
        line=line,
    )
    store.begin(FIRST_LOOK)
    app = create_app(backend)
    served = server.create(app, options.host, options.port)
    gc.freeze()  # else each search for garbage looks through all of MLflow: a fifth of a second
    try:
        served.run()
    finally:
        if left := backend.log.flush(LOG_WITHIN):
            log.warning("%d verdicts are not in the log: %s", left, backend.log.trouble)


def tokens(env: Mapping[str, str]) -> dict[Role, str]:
    """Return the tokens of roles, as far as they are set."""
    given = {
        Role.ENGINEER: env.get("API_TOKEN"),
        Role.OPERATOR: env.get("OPERATOR_TOKEN"),
        Role.VIEWER: env.get("VIEW_TOKEN"),
    }
    return {role: token for role, token in given.items() if token}


def arguments(env: Mapping[str, str]) -> argparse.Namespace:
    """Read the options, whose defaults are variables of the environment.

    Raises:
        PipelineError: the port or the time limit is no number or out of range.
    """
    parser = cli.parser(__doc__, "API_TOKEN=secret python api.py --port 8080", data=False)
    parser.add_argument("--host", default=env.get("API_HOST", "0.0.0.0"), help="or API_HOST")
    parser.add_argument(
        "--port",
        type=port,
        default=env.get("API_PORT", str(settings.API_PORT)),
        help="or API_PORT",
    )
    parser.add_argument(
        "--jobs",
        default=env.get("JOBS_PATH", settings.JOBS_PATH),
        metavar="DIR",
        help="where jobs are kept, relative to the project's root; or JOBS_PATH",
    )
    parser.add_argument(
        "--time-limit",
        type=seconds,
        default=env.get("RETRAIN_TIME_LIMIT", "3600"),
        metavar="SECONDS",
        help="after which a retraining is ended; or RETRAIN_TIME_LIMIT",
    )
    parser.add_argument(
        "--log",
        type=Path,
        metavar="FILE",
        help="for all output, in files of 5 MB of which the newest three are kept",
    )
    parser.add_argument(
        "--pid-file",
        type=Path,
        metavar="FILE",
        help="for the process id; it is locked as long as the API runs",
    )
    return parser.parse_args()


def port(text: str) -> int:
    """Read a port.

    Raises:
        PipelineError: it is no number, or out of range.
    """
    if not re.fullmatch("[0-9]{1,5}", text) or not 0 < int(text) < 65536:
        raise PipelineError(f"The port (--port or API_PORT) is {text!r}, expected 1 to 65535")
    return int(text)


def seconds(text: str) -> float:
    """Read the time limit.

    Raises:
        PipelineError: it is no number, or not more than 0.
    """
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not number > 0:
        raise PipelineError(
            f"The time limit (--time-limit or RETRAIN_TIME_LIMIT) is {text!r}, expected seconds, "
            f"more than 0"
        )
    return number


def hold(pid_file: Path) -> None:
    """Lock a file until this process ends, and write the process id into it.

    Raises:
        PipelineError: another API holds it.
    """
    descriptor = os.open(pid_file, os.O_RDWR | os.O_CREAT, 0o644)
    deadline = time.monotonic() + 1
    while not locks.take(descriptor):  # start_api.sh looks at the lock in passing
        if time.monotonic() > deadline:
            raise PipelineError(f"The API is running already, as {pid_file} shows")
        time.sleep(0.02)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)


if __name__ == "__main__":
    cli.run(main)
