"""Say what a test accuracy on these pictures would be worth, before anything is trained.

Unreadable, doubled and odd-sized pictures; pictures made from one photograph, wherever they lie;
photographs under two labels; how many test pictures show a photograph that is also in training.
"""

import json
from argparse import ArgumentTypeError
from pathlib import Path

from defect_detection import audit, script, settings
from defect_detection.files import replacing, write_mapping
from defect_detection.settings import Config


def main() -> int:
    """Options and settings; then split anew if asked to, look, and say what was found."""
    parser = script.parser(__doc__, "python src/audit.py --data ~/pictures/castings --strict")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all that was found")
    parser.add_argument(
        "--groups", type=Path, metavar="FILE.csv", help="the photograph of each picture: path,photo"
    )
    parser.add_argument(
        "--sheet", type=Path, metavar="FILE.png", help="a picture of the worst that was found"
    )
    parser.add_argument(
        "--resplit",
        type=_share,
        metavar="SHARE",
        help="write split.csv into the data folder: a test set of this share, clean by photograph",
    )
    parser.add_argument("--strict", action="store_true", help="exit code 1 unless all is clean")
    options = parser.parse_args()
    config = settings.read_yaml(settings.CONFIG_FILE, Config)
    folder = script.data_folder(options.data, settings.environment(), config.paths.data_path)
    parameters, cache = config.model_parameters, settings.from_root(config.paths.cache)

    if options.resplit:
        written = audit.resplit(
            folder, options.resplit, parameters.seed, parameters.image_size, cache
        )
        print(f"Written: {written}. Delete it to go back.\n")
    found = audit.inspect(folder, parameters.image_size, cache)
    print(audit.text(found))
    if options.json:
        with replacing(options.json) as temporary:
            temporary.write_text(json.dumps(found.as_dict(), indent=1) + "\n")
    if options.groups:
        write_mapping(options.groups, "path", "photo", found.groups())
    if options.sheet:
        from defect_detection import plots  # matplotlib: 1 s

        with replacing(options.sheet) as temporary:
            plots.contact_sheet(folder, found).savefig(temporary, format="png")
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
    script.run(main)
