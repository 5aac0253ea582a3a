"""A child process that finds which images come from one photograph.

It reads their files by SHA-256, and the cache's folder, as JSON from standard input, and prints the
number of the photograph of each. What serves need not import OpenCV and SciPy for that.
"""

import json
import os
import sys
from pathlib import Path

from defect_detection import cli

NICENESS = 10  # so that inference on the same machine goes first


def main() -> None:
    """Read, compare, print."""
    os.nice(NICENESS)
    asked = json.load(sys.stdin)
    from defect_detection.dataset import photographs

    files = {content: Path(file) for content, file in asked["files"].items()}
    print(json.dumps(photographs.find(files, Path(asked["cache"]))), flush=True)


if __name__ == "__main__":
    cli.run(main)
