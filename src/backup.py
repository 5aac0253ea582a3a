"""Back up everything that cannot be made again, while everything runs; or restore it.

A backup has the tracking store with its artifacts, labels and approved images, the verdict log,
retrainings, trainings that MLflow lacks and the configuration with its passwords; on the machine of
the team's server also its database. Images in train/ and test/ are not in it.
"""

import logging
from argparse import ArgumentTypeError
from collections.abc import Mapping
from pathlib import Path

from defect_detection import cli, settings
from defect_detection.operations import backup, tracking_server
from defect_detection.operations.backup import Locations

log = logging.getLogger(__name__)


def main() -> None:
    """Read the options, then back up or restore."""
    parser = cli.parser(__doc__, "make backup TO=/mnt/backups", data=False)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--to", type=_folder, metavar="DIR", help="make a backup in a folder there")
    what.add_argument("--restore", type=_folder, metavar="DIR", help="restore the backup there")
    options = parser.parse_args()
    if options.to:
        here = locations(settings.environment(), settings.read_config())
        made = backup.make(here, options.to)
        for one in made.left_out:
            log.warning("Not in the backup: %s", one)
        print(f"{made.folder}: {len(made.files)} files, {made.size / 2**20:.1f} MB")
        return
    known = backup.read(options.restore)
    kept = options.restore / "configuration"  # says where everything belongs
    config = settings.read_config(str(kept / "src" / "config.yaml"))
    here = locations(settings.environment(env_file=kept / ".env"), config)
    for name in backup.restore(options.restore, known, here):
        log.info("%s is that of the backup now", name)
    for one in known["left_out"]:
        log.warning("Not in the backup: %s", one)
    print(f"Restored what was backed up at {known['made_at']}: {len(known['files'])} files")


def locations(env: Mapping[str, str], config: settings.Config) -> Locations:
    """Return where everything is."""
    return Locations(
        root=settings.ROOT,
        store=settings.tracking_uri(env),
        data=settings.from_root(env.get("DATA_PATH", config.paths.data_path)),
        line=settings.line_folder(env, config),
        jobs=settings.from_root(env.get("JOBS_PATH", settings.JOBS_PATH)),
        cache=settings.from_root(config.paths.cache),
        best_model=config.best_model,
        server=tracking_server.chosen(env),
    )


def _folder(text: str) -> Path:
    if not text:
        raise ArgumentTypeError("no folder is named")
    return Path(text)


if __name__ == "__main__":
    cli.run(main)
