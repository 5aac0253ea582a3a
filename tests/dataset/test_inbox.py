"""Labels in quarantine: nothing is lost, nothing is learned from before an engineer says so."""

import csv
import hashlib
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import ROOT
from defect_detection import PipelineError
from defect_detection.dataset import inbox as inboxes
from defect_detection.dataset.inbox import Inbox, Label, Refused, Sample, Seen, order_for_decision
from logged import PART

SEEN = Seen(7, "ok", 0.12, "Production_Reg/1", "audit", "part_7")


def other(number: int) -> bytes:
    """Return another image file: what follows the image is ignored."""
    return PART + b"\0" * (number + 1)


@pytest.fixture
def inbox(tmp_path) -> Inbox:
    return Inbox(tmp_path / "data")


def table(inbox: Inbox) -> list[dict]:
    with (inbox.folder / "labels.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_label_lies_beside_its_image_with_who_and_when(inbox):
    label = inbox.add("def_front", "Ada", SEEN, PART, blind=True)
    (row,) = table(inbox)
    assert row == {name: getattr(label, name) for name in inboxes.COLUMNS}
    assert (row["label"], row["by"], row["blind"], row["state"]) == (
        *("def_front", "Ada", "yes", "waiting"),
    )
    assert (row["verdict"], row["probability"], row["waits"]) == ("ok", "0.120000", "audit")
    assert row["at"].endswith("+00:00")
    image = inbox.folder / row["image"]
    assert image.read_bytes() == PART
    assert image.name == f"{hashlib.sha256(PART).hexdigest()}.jpeg"
    assert label.corrects and inbox.labels() == [label]
    assert not (inbox.data / "field").exists()


def test_label_can_be_taken_back_by_its_person_until_it_is_decided(inbox):
    label = inbox.add("def_front", "Ada", SEEN, PART, blind=False)
    with pytest.raises(Refused, match="Ada gave this label, and not Bob"):
        inbox.take_back(label.id, "Bob")
    assert inbox.take_back(label.id, "Ada") == label
    assert inbox.labels() == [] and inbox.file(label) is None
    label = inbox.add("def_front", "Ada", SEEN, PART, blind=False)
    inbox.reject(label.id, "Eve")
    with pytest.raises(Refused, match="was rejected by Eve meanwhile"):
        inbox.take_back(label.id, "Ada")
    with pytest.raises(Refused, match="no such label"):
        inbox.take_back("none", "Ada")


def test_one_person_labels_an_image_once_and_two_may_disagree(inbox):
    inbox.add("def_front", "Ada", SEEN, PART, blind=False)
    with pytest.raises(Refused, match="Ada has labelled this image already"):
        inbox.add("ok_front", "Ada", SEEN, PART, blind=False)
    second = inbox.add("ok_front", "Bob", SEEN, PART, blind=False)
    inbox.take_back(second.id, "Bob")
    assert inbox.file(inbox.labels()[0]).read_bytes() == PART  # the other label needs it


def test_approved_image_moves_to_the_folder_of_its_class(inbox):
    label = inbox.add("def_front", "Ada", SEEN, PART, blind=False)
    decided = inbox.approve(label.id, "Eve")
    assert (decided.state, decided.approved_as, decided.decided_by) == (
        *("approved", "def_front", "Eve"),
    )
    target = inbox.data / "field" / "def_front" / label.image
    assert target.read_bytes() == PART
    assert not (inbox.folder / label.image).exists() and inbox.file(label) == target
    for change in (inbox.approve, inbox.reject):
        with pytest.raises(Refused, match="was approved already, by Eve"):
            change(label.id, "Eve")


def test_engineer_may_say_another_class_and_the_label_stays_as_it_was(inbox):
    label = inbox.add("cannot_tell", "Ada", SEEN, PART, blind=False)
    with pytest.raises(Refused, match="Say whether the image shows a defect or a good part"):
        inbox.approve(label.id, "Eve")
    decided = inbox.approve(label.id, "Eve", "ok_front")
    assert (decided.label, decided.approved_as) == ("cannot_tell", "ok_front")
    assert (inbox.data / "field" / "ok_front" / label.image).exists()


def test_one_image_is_not_approved_as_both_classes(inbox):
    first = inbox.add("def_front", "Ada", SEEN, PART, blind=False)
    second = inbox.add("ok_front", "Bob", SEEN, PART, blind=False)
    third = inbox.add("def_front", "Cyd", SEEN, PART, blind=False)
    inbox.approve(first.id, "Eve")
    with pytest.raises(Refused, match="was approved as def_front"):
        inbox.approve(second.id, "Eve")
    inbox.approve(third.id, "Eve")
    inbox.reject(second.id, "Eve")
    assert len(list((inbox.data / "field").rglob("*.jpeg"))) == 1
    assert [path.name for path in inbox.folder.iterdir() if path.suffix == ".jpeg"] == []


@pytest.mark.parametrize("content", [b"", b"no image", PART[:300]], ids=["empty", "text", "cut"])
def test_what_cannot_be_decoded_is_not_learned_from(inbox, content):
    label = inbox.add("def_front", "Ada", replace(SEEN, verdict="error"), content, blind=False)
    with pytest.raises(Refused, match="so there is nothing to learn from"):
        inbox.approve(label.id, "Eve")
    assert inbox.labels()[0].state == "waiting" and not (inbox.data / "field").exists()
    inbox.reject(label.id, "Eve")


def test_missing_image_is_said(inbox):
    label = inbox.add("def_front", "Ada", SEEN, PART, blind=False)
    (inbox.folder / label.image).unlink()
    with pytest.raises(Refused, match="does not exist"):
        inbox.approve(label.id, "Eve")


def test_sample_counts_what_people_found_among_the_parts_that_pass(inbox):
    answers = ["ok_front", "ok_front", "def_front", "cannot_tell", "def_front"]
    labels = [
        inbox.add(answer, "Ada", replace(SEEN, verdict_id=n), other(n), blind=False)
        for n, answer in enumerate(answers)
    ]
    inbox.add("def_front", "Ada", replace(SEEN, verdict_id=9, waits="band"), other(9), False)
    newer = replace(SEEN, verdict_id=10, model="Production_Reg/2")
    inbox.add("ok_front", "Ada", newer, other(10), False)
    assert inbox.sample("Production_Reg/1") == Sample(2, 4)
    assert inbox.sample() == Sample(2, 5)
    inbox.reject(labels[4].id, "Eve")  # out of training, but it was seen
    assert inbox.sample("Production_Reg/1") == Sample(2, 4)
    inbox.add("def_front", "Bob", replace(SEEN, verdict_id=0), other(0), False)
    assert inbox.sample("Production_Reg/1") == Sample(3, 4)  # people disagree
    inbox.approve(labels[2].id, "Eve", "ok_front")  # it was no defect after all
    inbox.approve(labels[0].id, "Eve")
    assert inbox.sample("Production_Reg/1") == Sample(1, 4)
    assert inbox.overrides() == {("ok", "def_front"): 4}


def test_contradictions_come_first_then_corrections(inbox):
    def add(answer: str, by: str, number: int, verdict: str = "ok") -> Label:
        seen = replace(SEEN, verdict_id=number, verdict=verdict)
        return inbox.add(answer, by, seen, other(number), blind=False)

    confirmed = add("ok_front", "Ada", 1)
    corrected = add("def_front", "Ada", 2)
    twice = [add("ok_front", name, 3) for name in ("Ada", "Bob")]
    against = [add("ok_front", "Ada", 4), add("def_front", "Bob", 5)]
    photographs = {one.content: one.content for one in inbox.labels()}
    photographs[against[1].content] = against[0].content  # two images of one photograph
    found = order_for_decision(inbox.labels(), lambda one: photographs[one.content])
    assert {one.id for one in found[:2]} == {one.id for one in against}
    assert found[2] == corrected
    assert {one.id for one in found[3:5]} == {one.id for one in twice}
    assert found[5] == confirmed
    inbox.approve(against[0].id, "Eve")  # the other still contradicts it
    found = order_for_decision(inbox.labels(), lambda one: photographs[one.content])
    assert found[0] == against[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "its first line must be id,image"),
        (b"path,label\n", "its first line must be id,image"),
        (b"\xff\xfe", "cannot be read"),
        (b",".join(name.encode() for name in inboxes.COLUMNS) + b"\na,b\n", "line 2: has 2 col"),
    ],
    ids=range(4),
)
def test_damaged_table_is_said_and_left_alone(inbox, content, message):
    inbox.folder.mkdir(parents=True)
    (inbox.folder / "labels.csv").write_bytes(content)
    for call in (inbox.labels, lambda: inbox.add("ok_front", "Ada", SEEN, PART, False)):
        with pytest.raises(PipelineError, match=message):
            call()
    assert (inbox.folder / "labels.csv").read_bytes() == content


def test_names_that_look_like_formulas_stay_names(inbox):
    seen = replace(SEEN, part="=1+1")
    inbox.add("def_front", '+Ada,\n"x"', seen, PART, blind=False)
    again = Inbox(inbox.data).labels()[0]
    assert (again.part, again.by) == ("=1+1", '+Ada,\n"x"')
    assert table(inbox)[0]["part"] == "'=1+1"


ADDS = """
import sys
sys.path[:0] = [{src!r}, {tests!r}]
from pathlib import Path
from dataclasses import replace
from defect_detection.dataset.inbox import Inbox, Seen
from logged import PART
inbox = Inbox(Path(sys.argv[1]))
for number in range(20):
    seen = Seen(number, "ok", 0.1, "Production_Reg/1", "", str(number))
    inbox.add("ok_front", sys.argv[2], seen, PART + bytes([number]), False)
"""


def test_several_processes_lose_no_label_of_each_other(inbox):
    program = ADDS.format(src=str(ROOT / "src"), tests=str(ROOT / "tests"))
    command = [sys.executable, "-c", program, str(inbox.data)]
    running = [subprocess.Popen([*command, name]) for name in ("Ada", "Bob", "Cyd")]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    labels = inbox.labels()
    assert len({one.id for one in labels}) == 60
    assert {(one.by, one.part) for one in labels} == {
        (name, str(number)) for name in ("Ada", "Bob", "Cyd") for number in range(20)
    }


def test_who_holds_the_lock_sees_no_image_of_a_rejected_label(inbox):
    """A backup does."""
    over, left, looked = threading.Event(), list[Label](), 0

    def look() -> None:
        nonlocal looked
        beside = Inbox(inbox.data)
        while not over.is_set():
            with beside.at_rest():
                left.extend(one for one in beside.labels() if beside.file(one) is not None)
                looked += 1

    looks = threading.Thread(target=look)
    looks.start()
    for number in range(100):
        label = replace(SEEN, verdict_id=number)
        inbox.reject(inbox.add("ok_front", "Ada", label, other(number), blind=False).id, "Eve")
    over.set()
    looks.join()
    assert looked > 10 and not [one for one in left if one.state == "rejected"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder_is_said(tmp_path):
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(PipelineError, match="cannot be written"):
            Inbox(Path(tmp_path)).add("ok_front", "Ada", SEEN, PART, False)
    finally:
        tmp_path.chmod(0o755)
