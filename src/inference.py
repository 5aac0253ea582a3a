"""Say of pictures whether they show a defect, by the model Production_Reg@prod.

Folders are searched for .jpeg, .jpg and .png files. Without pictures, the two examples of
src/config.yaml are run.
"""

import csv
import json
import logging
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path

from defect_detection import PipelineError, dataset, registry, script, settings, tracking
from defect_detection.files import replacing
from defect_detection.images import UnreadableImage
from defect_detection.settings import Config

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """One picture's outcome.

    Attributes:
        path: as it was given.
        verdict: "defect" or "ok".
        probability: of a defect, in [0, 1].
        review: "yes" where it is too near to the threshold to go by, else "no".
    """

    path: str
    verdict: str
    probability: float
    review: str


def main() -> None:
    """Settings, pictures, model; then a verdict each."""
    parser = script.parser(__doc__, "python src/inference.py line3/ part.jpeg --csv verdicts.csv")
    parser.add_argument("pictures", nargs="*", metavar="IMAGE or FOLDER")
    parser.add_argument(
        "--csv", type=Path, metavar="FILE", help="write path,verdict,probability,review"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a list of the same keys")
    options = parser.parse_args()
    env = settings.environment()
    config = settings.read_yaml(settings.CONFIG_FILE, Config)
    if options.pictures:
        pictures = find(options.pictures)
    else:
        folder = script.data_folder(options.data, env, config.paths.data_path)
        pictures = dataset.example_pictures(folder, config.inference_examples, log.info)

    with tracking.connected(settings.tracking_uri(env)):
        version = registry.production_version(config.mlflow)
        classifier = registry.load_classifier(version.uri)
    log.info("%s version %d, test accuracy %.4f", version.name, version.number, version.acc)

    rows, skipped = [], []
    for picture in pictures:
        try:
            judged = classifier.classify(picture)
        except UnreadableImage as error:
            skipped.append((str(picture), str(error)))
            continue
        review = "yes" if judged.review else "no"
        rows.append(Row(str(picture), judged.verdict, round(judged.probability, 6), review))
        print(f"{picture}  {judged}", flush=True)
    if options.csv:
        write_csv(options.csv, rows)
    if options.json:
        write_json(options.json, rows)
    dataset.refuse_many_skipped(tuple(skipped), len(pictures), "The pictures given")


def find(given: list[str]) -> list[Path]:
    """Return the pictures that are named, and those right in the folders that are named.

    Raises:
        PipelineError: a folder holds no pictures.
    """
    found: list[Path] = []
    for path in map(Path, given):
        inside = dataset.list_pictures(path) if path.is_dir() else [path]
        if not inside:
            raise PipelineError(f"{path} holds no .jpeg, .jpg or .png files")
        found += inside
    return found


def write_csv(path: Path, rows: list[Row]) -> None:
    """Write the rows with a header; the file is replaced whole or stays as it was."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in fields(Row))
        writer.writerows(map(astuple, rows))


def write_json(path: Path, rows: list[Row]) -> None:
    """Write the rows as a list of objects; the file is replaced whole or stays as it was."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    script.run(main)
