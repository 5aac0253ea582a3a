"""Progress: shares, the time left, lines without a terminal, and a bar with lines above it."""

import io
import logging
import sys
from types import SimpleNamespace

import pytest

from defect_detection import progress
from defect_detection.progress import Progress


class Terminal(io.StringIO):
    """One of the streams that write to a terminal."""

    def __init__(self, screen: list[str]):
        """Write to `screen`."""
        super().__init__()
        self._screen = screen

    def write(self, text):
        self._screen.append(text)
        return len(text)

    def isatty(self):
        return True


def test_parts_count_by_their_costs():
    shown = Progress("Work", {"features": 30.0, "epochs": 10.0})
    assert shown.share == 0
    shown.reached("features", 0.5)
    assert shown.share == pytest.approx(15 / 40)
    shown.reached("features", 1)
    shown.reached("epochs", 0.5)
    assert shown.share == pytest.approx(35 / 40)


def test_a_part_may_turn_out_to_cost_more_or_less():
    shown = Progress("Work", {"describe": 10.0, "compare": 10.0})
    shown.reached("describe", 1)
    shown.counted("compare", 10, 30)
    assert shown.share == pytest.approx(20 / 40)
    shown.counted("compare", 12, 12)
    assert shown.share == pytest.approx(1)


def test_what_was_not_necessary_does_not_count():
    shown = Progress("Work", {"features": 30.0, "epochs": 10.0})
    shown.reached("features", 0.1)
    shown.finished("features")  # the rest was in the cache
    assert shown.share == pytest.approx(3 / 13)
    shown.finished("features")  # another set has the same features
    shown.reached("epochs", 1)
    assert shown.share == pytest.approx(1)


def test_work_that_costs_nothing_is_done():
    assert Progress("Work", {"features": 0.0}).share == 1


def test_without_a_terminal_a_line_says_how_long_it_will_take(monkeypatch, caplog):
    now = iter([100.0, 110.0, 130.0, 131.0])
    # The module's own clock only: threads of other tests may look at theirs.
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(now)))
    caplog.set_level(logging.INFO)
    shown = Progress("Training", {"a": 1.0})
    for share in (0.1, 0.25, 0.26):
        shown.reached("a", share)
    assert caplog.messages == ["Training: 25%, 1:30 to go"]


def test_lines_stand_above_the_bar(monkeypatch):
    """Whole lines are written after the bar is wiped; the bar is gone in the end."""
    screen: list[str] = []
    monkeypatch.setattr(sys, "stderr", Terminal(screen))
    monkeypatch.setattr(sys, "stdout", Terminal(screen))
    with progress.shown("Training", {"a": 1.0}) as shown:
        shown.reached("a", 0.5)
        print("epoch", 1)
        shown.reached("a", 1.0)
    text = "".join(screen)
    assert "Training" in text and "to go" in text
    before, after = text.split("epoch 1\n")
    assert before.endswith("\r")  # wiped, and back at the start of the line
    assert after.startswith("\rTraining") and text.endswith("\r")
