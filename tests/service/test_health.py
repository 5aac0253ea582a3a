"""What is known of the store without a call having to wait for it."""

import sys
import threading
import time

import pytest

from conftest import wait_for
from defect_detection import StoreError
from defect_detection.registry import promotion, versions
from defect_detection.service import health
from defect_detection.service.health import StoreWatch

# The thread looks for ever; the tests end it by an exception.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

FOUND = versions.Version("Production_Reg", 3, 0.9)


@pytest.fixture
def store(_store, monkeypatch):
    """Watch a store that answers what `said` holds, or does what that does."""
    monkeypatch.setattr(health, "LOOK_EVERY", 0.02)
    monkeypatch.setattr(promotion, "check_record", lambda name: None)
    watch = StoreWatch(_store, "Production_Reg")
    watch.said = lambda: FOUND
    monkeypatch.setattr(versions, "in_production", lambda _: watch.said())
    yield watch
    watch.said = sys.exit
    for thread in threading.enumerate():
        if thread.name == "store":
            thread.join(60)


def fail(error: Exception):
    raise error


def test_first_look_is_waited_for(store):
    store.begin(60)
    assert store.last().reachable
    assert store.last().production == {"registry": "Production_Reg", "version": 3, "acc": 0.9}


def test_store_that_hangs_at_the_first_look_is_not_waited_for(store):
    released = threading.Event()
    store.said = released.wait
    began = time.monotonic()
    store.begin(0.2)
    assert time.monotonic() - began < 10
    assert not store.last().reachable
    released.set()


def test_look_that_hangs_makes_the_store_unreachable(store, monkeypatch):
    monkeypatch.setattr(health, "GOOD_FOR", 1)
    released = threading.Event()
    store.begin(60)
    assert store.last().reachable
    store.said = lambda: released.wait() and FOUND
    wait_for(lambda: not store.last().reachable)
    assert store.last().production is None
    released.set()
    wait_for(lambda: store.last().reachable)


@pytest.mark.parametrize("error", [StoreError("locked"), ValueError("acc"), KeyError("x")])
def test_error_is_told_once_and_the_next_look_follows(store, caplog, error):
    store.begin(60)
    caplog.clear()
    for _ in range(2):
        store.said = lambda: fail(error)
        wait_for(lambda: not store.last().reachable)
        time.sleep(0.2)  # several looks
        store.said = lambda: FOUND
        wait_for(lambda: store.last().reachable)
    assert len(caplog.messages) == 2
