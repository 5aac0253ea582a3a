"""What all scripts share."""

import subprocess
import sys

import pytest

from conftest import ROOT

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
