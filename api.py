"""The API: start, watch and cancel retrainings; see whether everything works.

    POST   /retrain            start one; JSON with epochs, batch_size, learning_rate if wanted
    GET    /retrain            all jobs, newest first
    GET    /retrain/<id>       state, progress, result
    GET    /retrain/<id>/log   its output
    DELETE /retrain/<id>       cancel it
    GET    /health             version in production, store, running job

If the variable API_TOKEN is set, POST and DELETE need 'Authorization: Bearer <token>'. Without it
they are accepted from this machine only.
"""

import argparse
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "src"))

import waitress  # noqa: E402

from defect_detection import PipelineError, cli, settings  # noqa: E402
from defect_detection.service.app import LARGEST_BODY, create_app  # noqa: E402
from defect_detection.service.jobs import Jobs  # noqa: E402
from defect_detection.settings import RetrainConfig  # noqa: E402

log = logging.getLogger("api")


def main() -> None:
    """Read options and settings, then serve until stopped."""
    env = settings.environment()
    options = arguments(env)
    configured = settings.read_yaml(ROOT / "re_train" / "re_train.yaml", RetrainConfig)
    names = configured.mlflow.of(settings.read_config().product)
    command = [sys.executable, str(ROOT / "re_train" / "re_train.py")]
    folder = settings.from_root(options.jobs)
    jobs = Jobs(folder, command, ROOT, options.time_limit, os.environ)
    store, token = settings.tracking_uri(env), env.get("API_TOKEN")
    app = create_app(jobs, store, names.production_model_name, token)
    log.info("Serving on http://%s:%d", options.host, options.port)
    try:
        waitress.serve(
            app,
            host=options.host,
            port=options.port,
            threads=16,  # a call with ?wait=true holds one while its job runs
            max_request_body_size=64 * LARGEST_BODY,  # larger bodies are not even read
            ident="defect-detection",
        )
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PipelineError(
            f"{options.host}:{options.port} cannot be served ({reason}). Choose another port "
            f"with --port or API_PORT"
        ) from error


def arguments(env: Mapping[str, str]) -> argparse.Namespace:
    """Read the options, whose defaults are variables of the environment.

    Raises:
        PipelineError: the port is out of range.
    """
    parser = cli.parser(__doc__, "API_TOKEN=secret python api.py --port 8080", data=False)
    parser.add_argument("--host", default=env.get("API_HOST", "0.0.0.0"), help="or API_HOST")
    parser.add_argument(
        "--port", type=int, default=env.get("API_PORT", settings.API_PORT), help="or API_PORT"
    )
    parser.add_argument(
        "--jobs",
        default=env.get("JOBS_PATH", settings.JOBS_PATH),
        metavar="DIR",
        help="where jobs are kept, relative to the project's root; or JOBS_PATH",
    )
    parser.add_argument(
        "--time-limit",
        type=float,
        default=env.get("RETRAIN_TIME_LIMIT", 3600),
        metavar="SECONDS",
        help="after which a retraining is ended; or RETRAIN_TIME_LIMIT",
    )
    options = parser.parse_args()
    if not 0 < options.port < 65536:
        raise PipelineError(f"The port is {options.port}, expected 1 to 65535")
    return options


if __name__ == "__main__":
    cli.run(main)
