"""The desk that asks the store: late answers, many callers, the end of the process."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest

from conftest import wait_for
from defect_detection import StoreError
from defect_detection.registry import store as stores
from defect_detection.service import store_desk
from defect_detection.service.store_desk import StoreDesk


@pytest.fixture
def desk(monkeypatch):
    monkeypatch.setattr(stores, "connected", lambda *_: nullcontext())
    return StoreDesk("sqlite://")


def test_answer_and_error_come_back(desk):
    assert desk.ask(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        desk.ask(lambda: 1 / 0)


def test_question_that_nobody_waits_for_is_not_carried_out(desk):
    held, done = threading.Event(), []
    with pytest.raises(StoreError, match="may still be carried out"):
        desk.ask(lambda: held.wait(20), 0.05)
    with pytest.raises(StoreError, match="does not answer$"):
        desk.ask(lambda: done.append("rolled back"), 0.05)
    held.set()
    assert desk.ask(lambda: list(done)) == []


def test_few_callers_wait_at_a_time(desk):
    held = threading.Event()
    with ThreadPoolExecutor(store_desk.MOST_WAITING) as pool:
        waiting = [pool.submit(desk.ask, lambda: held.wait(20), 20) for _ in range(4)]
        wait_for(lambda: desk._places._value == 0)
        with pytest.raises(StoreError, match="answers slowly"):
            desk.ask(lambda: 1)
        held.set()
        assert all(one.result() for one in waiting)
    assert desk.ask(lambda: 1) == 1
