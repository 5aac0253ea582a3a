"""Names of files as they are shown."""

import os
import subprocess
import sys

import pytest

from conftest import ROOT
from defect_detection.names import is_utf8, printable


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("train/ok_front/größe 3 部品 🚀.png", "train/ok_front/größe 3 部品 🚀.png"),
        ("a\nb\r\tc.png", r"a\nb\r\tc.png"),
        ("\x1b[31mred\x07.png", r"\x1b[31mred\x07.png"),
        (os.fsdecode(b"part_\xff.png"), r"part_\xff.png"),
        ("gnp.\u202eexe", r"gnp.\u202eexe"),
        ("\x7f\x80\x9b\x85", r"\x7f\x80\x9b\x85"),
        ("\u2066\u200f\u2028", r"\u2066\u200f\u2028"),
        ("\udc9b", r"\x9b"),
        ("", ""),
    ],
)
def test_what_would_not_stand_in_a_line_is_escaped(name, shown):
    assert printable(name) == shown
    assert printable(name).isprintable() and is_utf8(printable(name))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a" * 18, "a" * 18),
        ("a" * 19, "a" * 15 + "..."),
        ("\n" * 300_000, "\\n" * 7 + "\\..."),
    ],
)
def test_line_of_limited_length(text, shown):
    assert printable(text, 18) == shown


@pytest.mark.parametrize("name", [b"part_\xff.png", b"\xc3\x28", b"gr\xf6\xdfe"])
def test_bytes_that_are_not_utf8_are_told(name):
    assert not is_utf8(os.fsdecode(name))
    assert is_utf8(os.fsdecode(name.decode("latin-1").encode()))


def ended(what: str) -> tuple[bytes, bytes, int]:
    """Run a script whose `main` does something; return what it printed and its exit code."""
    program = f"""
import logging, os
from defect_detection import PipelineError, cli
NAME = os.fsdecode(b"a\\nb\\x1b[31m\\xff.png")
def main():
    {what}
cli.run(main)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT / "src", capture_output=True)
    return done.stdout, done.stderr, done.returncode


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ('raise PipelineError(f"{NAME} is broken")', rb"error: a\nb\x1b[31m\xff.png is broken"),
        ("open(NAME)", rb"error: a\nb\x1b[31m\xff.png: No such file or directory"),
    ],
)
def test_errors_are_one_line_whatever_the_names(what, said):
    assert ended(what) == (b"", said + b"\n", 1)


def test_messages_are_one_line_whatever_the_names():
    said = rb"a\nb\x1b[31m\xff.png is skipped" + b"\n"
    assert ended('logging.getLogger("x").warning("%s is skipped", NAME)') == (b"", said, 0)


def test_what_cannot_be_written_on_standard_output_is_escaped():
    stdout, stderr, code = ended('print(os.fsdecode(b"part_\\xff.png"))')
    assert (stdout, stderr, code) == (b"part_\\udcff.png\n", b"", 0)
