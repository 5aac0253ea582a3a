"""Standard error of native libraries."""

import os

import pytest

from defect_detection.runtime import native_output


def test_greetings_are_held_back_and_the_reason_of_a_failure_is_shown(capfd):
    with native_output.suppressed():
        os.write(2, b"greeting")
    assert capfd.readouterr().err == ""
    with pytest.raises(RuntimeError), native_output.suppressed():
        os.write(2, b"reason")
        raise RuntimeError
    os.write(2, b" afterwards")
    assert capfd.readouterr().err == "reason afterwards"
