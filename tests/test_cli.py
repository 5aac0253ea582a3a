"""What all scripts share."""

import subprocess
import sys

import pytest

from conftest import ROOT

FAIL = """
import logging, sys
from defect_detection import PipelineError, cli

def main():
    try:
        raise ValueError(sys.argv[1])
    except ValueError:
        logging.exception("%s: not read", sys.argv[1])
    if sys.argv[2] == "os":
        open(sys.argv[1])
    raise PipelineError(f"{sys.argv[1]} is wrong")

cli.run(main)
"""


@pytest.mark.parametrize("kind", ["pipeline", "os"])
def test_errors_and_logs_give_no_orders_to_a_terminal(kind):
    done = subprocess.run(
        [sys.executable, "-c", FAIL, "a\x1b]0;x\x07\nerror: b\u202e.png", kind],
        cwd=ROOT / "src",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert not [line for line in lines if not line.isprintable()]
    assert lines[0] == r"a\x1b]0;x\x07\nerror: b\u202e.png: not read"
    assert lines[1].startswith("Traceback")
    assert lines[-1].startswith(r"error: a\x1b]0;x\x07\nerror: b\u202e.png")


PROGRAM = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT / "src")!r})
from defect_detection import cli

def main():
    with cli.uninterrupted():
        os.kill(os.getpid(), signal.NAME)
        print("first step")
        os.kill(os.getpid(), signal.NAME)
        print("second step")
        FAIL
    print("not reached")

cli.run(main)
"""


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
@pytest.mark.parametrize("failing", ["", "raise ValueError('in the block')"])
def test_signal_acts_right_after_two_steps_that_belong_together(name, code, failing):
    program = PROGRAM.replace("NAME", name).replace("FAIL", failing)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "first step\nsecond step\n"
    assert done.returncode == code, done.stderr


def test_without_a_signal_nothing_happens_and_the_next_one_acts_at_once():
    program = PROGRAM.replace("os.kill(os.getpid(), signal.NAME)", "pass").replace("FAIL", "")
    program = program.replace('print("not', 'os.kill(os.getpid(), signal.SIGTERM)\n    print("not')
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "first step\nsecond step\n"
    assert done.returncode == 143, done.stderr
