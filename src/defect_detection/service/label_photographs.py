"""Which labels are about one photograph, found in the background by a child process."""

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from defect_detection.dataset.inbox import Inbox, Label
from defect_detection.runtime import preprocessing
from defect_detection.runtime.preprocessing import UnreadableImage

log = logging.getLogger("api")

MODULE = "defect_detection.dataset.same_photograph"  # that the child process runs
PATIENCE = 600  # seconds


class LabelPhotographs:
    """Knows the photograph of each label's image, as far as it has been compared.

    Attributes:
        comparing: whether images are being compared now.
    """

    def __init__(self, inbox: Inbox, cache: Path):
        """Compare the images of an inbox; what was found is kept in the folder `cache`."""
        self.comparing = False
        self._inbox, self._cache = inbox, cache
        self._known: dict[str, str] = {}  # the photograph of each content
        self._starting = threading.Lock()

    def of(self, labels: Sequence[Label]) -> dict[str, str]:
        """Return the photograph of each label's image, by the SHA-256 of its content.

        An image that was not compared yet is a photograph of its own; comparing it begins now.
        """
        contents = {one.content for one in labels}
        if contents - self._known.keys():
            with self._starting:
                if not self.comparing:
                    self.comparing = True
                    threading.Thread(target=self._compare, args=(labels,), daemon=True).start()
        return {content: self._known.get(content, content) for content in contents}

    def _compare(self, labels: Sequence[Label]) -> None:
        try:
            found = self._found(self._files(labels))
            first: dict[int, str] = {}
            for content in sorted(found):
                first.setdefault(found[content], content)
            known = {content: first[number] for content, number in found.items()}
            # What cannot be compared is not tried again.
            self._known = {one.content: one.content for one in labels} | known
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            log.warning("Images of labels were not compared: %s", error)
            self._known = {one.content: one.content for one in labels}
        finally:
            self.comparing = False

    def _files(self, labels: Sequence[Label]) -> dict[str, str]:
        """Return the readable files of labels, by the SHA-256 of their content."""
        files = {}
        for label in labels:
            file = self._inbox.file(label)
            if file is None or label.content in files:
                continue
            try:
                preprocessing.decode_within(file, 64)
            except UnreadableImage:
                continue
            files[label.content] = str(file)
        return files

    def _found(self, files: dict[str, str]) -> dict[str, int]:
        if not files:
            return {}
        done = subprocess.run(
            [sys.executable, "-m", MODULE],
            input=json.dumps({"files": files, "cache": str(self._cache)}),
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            text=True,
            timeout=PATIENCE,
            check=True,
        )
        found: dict[str, int] = json.loads(done.stdout)
        return found
