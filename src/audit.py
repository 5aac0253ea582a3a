"""Check a data folder for leakage and label errors before anything is trained on it.

It reports unreadable, duplicate and odd-sized images; images that come from one photograph;
photographs with two labels; and how many test images share a photograph with training.
"""

import json
from argparse import ArgumentTypeError
from pathlib import Path

from defect_detection import cli, settings
from defect_detection.atomic import replace_atomically, write_mapping
from defect_detection.dataset import audit, split
from defect_detection.dataset.folder import DataFolder


def main() -> int:
    """Read options and settings; then make a new split if asked to, inspect, and print."""
    parser = cli.parser(__doc__, "python src/audit.py --data ~/images/castings --strict")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all findings there")
    parser.add_argument(
        "--groups",
        type=Path,
        metavar="FILE.csv",
        help="write each image's photograph there",
    )
    parser.add_argument(
        "--sheet", type=Path, metavar="FILE.png", help="draw the worst findings there"
    )
    parser.add_argument(
        "--resplit",
        type=_share,
        metavar="SHARE",
        help="write split.csv into the data folder: a test set of this share without leakage",
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="exit code 1 on leakage, two labels or unreadable images",
    )
    options = parser.parse_args()
    config = settings.read_config(options.config)
    parameters = config.model_parameters
    env = settings.environment()
    folder = DataFolder.choose(options, env, config)
    takes = folder.image_format(parameters.image_size, parameters.color)

    if options.resplit:
        written = split.resplit(folder, options.resplit, parameters.seed, takes)
        print(f"Written: {written}. Delete it to undo this.\n")
    found = audit.inspect(folder, takes)
    print(audit.text(found, folder.command("src/audit.py", "--resplit", "0.2")))
    if options.json:
        with replace_atomically(options.json) as temporary:
            temporary.write_text(json.dumps(found.as_dict(), indent=1) + "\n")
    if options.groups:
        write_mapping(options.groups, "path", "photo", found.groups())
    if options.sheet:
        from defect_detection.evaluation import figures  # matplotlib takes 1 s

        with replace_atomically(options.sheet) as temporary:
            sheet = figures.contact_sheet(folder.path, found, takes.most_pixels)
            sheet.savefig(temporary, format="png")
    return int(options.strict and not found.clean)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0
    if not 0 < share < 1:
        raise ArgumentTypeError(f"{text} is not a share between 0 and 1")
    return share


if __name__ == "__main__":
    cli.run(main)
