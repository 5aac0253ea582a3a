"""How far long work is: a bar with the time left on a terminal, elsewhere a line now and then."""

import io
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm

log = logging.getLogger(__name__)

LOG_EVERY = 15  # seconds
BAR = "{desc} {percentage:3.0f}% |{bar}| {remaining} to go"


class Progress:
    """How much is done of work that has several parts.

    The time left is that of the work so far, in proportion. Parts that need not be done count no
    more, as features that are in the cache.
    """

    def __init__(self, what: str, costs: Mapping[str, float], bar: "tqdm | None" = None):
        """Begin.

        Args:
            what: the work, for messages.
            costs: of each part, in any unit.
            bar: shows it; without one, lines are logged.
        """
        self._what, self._costs, self._bar = what, dict(costs), bar
        self._shares = dict.fromkeys(costs, 0.0)
        self._began = self._said = time.monotonic()

    @property
    def share(self) -> float:
        """Share of the work that is done, in [0, 1]."""
        total = sum(self._costs.values())
        done = sum(cost * self._shares[part] for part, cost in self._costs.items())
        return done / total if total else 1.0

    def reached(self, part: str, share: float) -> None:
        """Say which share of a part is done, in [0, 1]."""
        self._shares[part] = share
        self._show()

    def counted(self, part: str, done: int, of: int) -> None:
        """Say how much of a part is done, and what it costs as far as is known by now."""
        self._costs[part] = float(of)
        self.reached(part, done / of)

    def finished(self, part: str) -> None:
        """Say that a part is finished; what was not done of it was not necessary."""
        self._costs[part] *= self._shares[part]
        self._shares[part] = 1.0
        self._show()

    def _show(self) -> None:
        share, now = self.share, time.monotonic()
        if self._bar is not None:
            self._bar.update(share - self._bar.n)
        elif now - self._said > LOG_EVERY and share:
            self._said = now
            minutes, seconds = divmod(round((now - self._began) * (1 - share) / share), 60)
            log.info("%s: %.0f%%, %d:%02d to go", self._what, 100 * share, minutes, seconds)


@contextmanager
def shown(what: str, costs: Mapping[str, float]) -> Iterator[Progress]:
    """Show progress during the block; what is printed meanwhile stands above the bar."""
    if not sys.stderr.isatty():
        yield Progress(what, costs)
        return
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    with (
        tqdm(total=1.0, desc=what, bar_format=BAR, smoothing=0, leave=False) as bar,
        logging_redirect_tqdm(),
        redirect_stdout(_Above(sys.stdout)),
    ):
        yield Progress(what, costs, bar)


class _Above(io.StringIO):
    """Writes whole lines, each above the bar."""

    def __init__(self, stream: TextIO):
        super().__init__()
        self._stream, self._line = stream, ""

    def write(self, text: str) -> int:
        from tqdm import tqdm

        *lines, self._line = (self._line + text).split("\n")
        if lines:
            with tqdm.external_write_mode(sys.stderr):
                self._stream.write("".join(f"{line}\n" for line in lines))
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()
