"""Start a tracking server for a team: MLflow on PostgreSQL, which asks for user and password.

The first start makes a database in .server, unless SERVER_DATABASE names one, and a password of the
user admin. The machines of the team then set MLFLOW_TRACKING_URI to this one's address.

With --migrate, runs, versions, aliases and artifacts of the sqlite store are copied into the
server's database, which must be empty.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from defect_detection import PipelineError, cli, settings, uris
from defect_detection.operations import tracking_server
from defect_detection.operations.tracking_server import SECRETS, Secrets, ServerPlan
from defect_detection.pipeline import delivery
from defect_detection.registry import runs, store


def main() -> None:
    """Read options and settings, then serve or migrate."""
    parser = cli.parser(__doc__, "make server", data=False)
    parser.add_argument("--migrate", action="store_true", help="copy the sqlite store, then end")
    options = parser.parse_args()
    env = settings.environment()
    plan = tracking_server.chosen(env)
    if options.migrate:
        # The keys of a bucket, where .env.local has them.
        os.environ |= {name: env[name] for name in env if name.startswith(("AWS_", "MLFLOW_S3_"))}
        migrate(plan, env)
        return
    tracking_server.run(plan, {**os.environ, **env}, lambda known: welcome(plan, known))


def welcome(plan: ServerPlan, known: Secrets) -> None:
    """Print where the server is and who may use it."""
    print(
        f"MLflow answers at {plan.address}; {tracking_server.described(plan)}\n"
        f"The password of the user {tracking_server.ADMIN} is in {plan.folder / SECRETS}\n"
        f"On each machine, put MLFLOW_TRACKING_URI=http://THIS-MACHINE:{plan.port}, "
        f"MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD into .env.local",
        flush=True,
    )


def migrate(plan: ServerPlan, env: Mapping[str, str]) -> None:
    """Copy the sqlite store into the server's database."""
    from defect_detection.operations import migration

    uri = settings.tracking_uri(env)
    if not uri.startswith(uris.SQLITE):
        raise PipelineError(
            f"MLFLOW_TRACKING_URI is no sqlite store. Run this with the store to copy: "
            f"MLFLOW_TRACKING_URI={settings.STORE} make server-migrate"
        )
    cache = settings.from_root(settings.read_config().paths.cache)
    with store.connected(uri), runs.watched(cache):
        delivery.deliver_all(cache, strict=True)
    with tracking_server.own(plan) as (_, database):
        source = Path(uri.removeprefix(uris.SQLITE))
        found = migration.take_over(source, settings.ROOT, database, plan.artifacts)
    print(f"Copied from {source}: {found}. Next: make server")


if __name__ == "__main__":
    cli.run(main)
