"""Labels that people at the line gave, in quarantine until an engineer decides.

They lie in `inbox/` of the data folder: `labels.csv` with a row for each label, and the images of
those that wait. An approved image moves to `field/`, into the folder of its class.
"""

import csv
import fcntl
import hashlib
import io
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from defect_detection import PipelineError
from defect_detection.atomic import csv_text, defused, replace_atomically, restored
from defect_detection.dataset.folder import FIELD, INBOX
from defect_detection.runtime import preprocessing
from defect_detection.runtime.decision import CLASSES, NEGATIVE, POSITIVE
from defect_detection.runtime.opening import suffix_of
from defect_detection.runtime.preprocessing import UnreadableImage

TABLE, LOCK = "labels.csv", ".lock"
CANNOT_TELL = "cannot_tell"
ANSWERS = (*CLASSES, CANNOT_TELL)

State = Literal["waiting", "approved", "rejected"]


class Refused(PipelineError):
    """A label cannot be changed as asked; the message says why."""


@dataclass(frozen=True)
class Seen:
    """What a person looked at.

    Attributes:
        verdict_id: in the verdict log, by which the label is known there.
        verdict: of the model.
        probability: of a defect; None for an error.
        model: that gave it.
        waits: why the image waited for a person, "" if it did not.
        part: id of the part.
    """

    verdict_id: int
    verdict: str
    probability: float | None
    model: str
    waits: str
    part: str


@dataclass(frozen=True)
class Label:
    """A label, one row of the table. Its fields are texts, as in the file.

    Attributes:
        id: of the label.
        image: name of the image's file, which begins with the SHA-256 of its content.
        label: "def_front", "ok_front" or "cannot_tell".
        by: who gave it.
        at: when; ISO 8601, UTC.
        blind: "yes" if the verdict was hidden until then.
        verdict_id: these and the following as in `Seen`.
        verdict: of the model.
        probability: of a defect.
        model: that gave it.
        waits: why the image waited for a person.
        part: id of the part.
        state: "waiting" for an engineer, "approved" or "rejected".
        approved_as: the class that an engineer approved, which may be another.
        decided_by: the engineer.
        decided_at: when.
    """

    id: str
    image: str
    label: str
    by: str
    at: str
    blind: str
    verdict_id: str
    verdict: str
    probability: str
    model: str
    waits: str
    part: str
    state: str = "waiting"
    approved_as: str = ""
    decided_by: str = ""
    decided_at: str = ""

    @property
    def content(self) -> str:
        """SHA-256 of the image's file."""
        return self.image.split(".")[0]

    @property
    def corrects(self) -> bool:
        """Whether it contradicts the verdict."""
        return (self.label, self.verdict) in ((POSITIVE, "ok"), (NEGATIVE, "defect"))


COLUMNS = [one.name for one in fields(Label)]


@dataclass(frozen=True)
class Sample:
    """What people found among the parts that pass, chosen at random.

    Attributes:
        defects: how many of them are defects.
        of: how many were judged.
    """

    defects: int
    of: int


class Inbox:
    """The labels of a data folder. Several processes may use it at once."""

    def __init__(self, data: Path):
        """Use the folder `inbox` of a data folder; it is made with the first label."""
        self.data = data
        self.folder = data / INBOX
        self._known: tuple[object, list[Label]] = (None, [])

    def labels(self) -> list[Label]:
        """Return all labels, the oldest first.

        Raises:
            PipelineError: the table cannot be read, or is none.
        """
        table = self.folder / TABLE
        try:
            status = table.stat()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise PipelineError(f"{table}: cannot be read ({error.strerror})") from error
        signature = status.st_mtime_ns, status.st_ino, status.st_size
        if self._known[0] != signature:
            self._known = signature, _read(table)
        return list(self._known[1])

    def file(self, label: Label) -> Path | None:
        """Return the file of a label's image, None if it was deleted or taken nowhere."""
        below = [self.folder, *(self.data / FIELD / name for name in CLASSES)]
        return next((one / label.image for one in below if (one / label.image).is_file()), None)

    def add(self, answer: str, by: str, seen: Seen, content: bytes, blind: bool) -> Label:
        """Keep a person's label for an image.

        Args:
            answer: one of `ANSWERS`.
            by: the person.
            seen: what the person looked at.
            content: of the image's file.
            blind: whether the verdict was hidden.

        Raises:
            Refused: this person labelled it already.
            PipelineError: the disk is full, or the folder cannot be written.
        """
        assert answer in ANSWERS
        image = hashlib.sha256(content).hexdigest() + suffix_of(content)
        probability = "" if seen.probability is None else f"{seen.probability:.6f}"
        label = Label(
            *(secrets.token_hex(6), image, answer, by, _now(), "yes" if blind else "no"),
            *(str(seen.verdict_id), seen.verdict, probability, seen.model, seen.waits, seen.part),
        )
        with self._changing() as labels:
            if any(one.by == by and same_image(one, label) for one in labels):
                raise Refused(f"{by} has labelled this image already. Undo that first")
            if not (self.folder / image).exists():
                with replace_atomically(self.folder / image) as temporary:
                    temporary.write_bytes(content)
            labels.append(label)
        return label

    def take_back(self, label_id: str, by: str) -> Label:
        """Delete a label that its person gave by mistake; return it.

        Raises:
            Refused: there is none, another person gave it, or an engineer has decided on it.
        """
        with self._changing() as labels:
            label = _find(labels, label_id)
            if label.by != by:
                raise Refused(f"{label.by} gave this label, and not {by}")
            if label.state != "waiting":
                raise Refused(f"This label was {label.state} by {label.decided_by} meanwhile")
            labels.remove(label)
        return label

    def approve(self, label_id: str, by: str, answer: str = "") -> Label:
        """Make an image training data, or part of the field test set.

        Args:
            label_id: of the label.
            by: the engineer.
            answer: the class, if the engineer says another than the label.

        Raises:
            Refused: there is no such label, it is decided already, it says no class, or the image
                was approved as the other class.
        """
        with self._changing() as labels:
            label = self._undecided(labels, label_id)
            label_as = answer or label.label
            if label_as not in CLASSES:
                raise Refused("Say whether the image shows a defect or a good part")
            for name in CLASSES:
                other = self.data / FIELD / name / label.image
                if name != label_as and other.exists():
                    raise Refused(
                        f"The same image was approved as {name}. Delete {other} if that was wrong"
                    )
            source = self.folder / label.image
            target = self.data / FIELD / label_as / label.image
            if not target.exists():
                content = _learnable(source)
                with replace_atomically(target) as temporary:
                    temporary.write_bytes(content)
            decided = self._decide(labels, label, "approved", by, label_as)
        return decided

    def reject(self, label_id: str, by: str) -> Label:
        """Keep an image out of training.

        Raises:
            Refused: there is no such label, or it is decided already.
        """
        with self._changing() as labels:
            decided = self._decide(labels, self._undecided(labels, label_id), "rejected", by)
            self._take_out(decided, labels)
        return decided

    def sample(self, model: str | None = None) -> Sample:
        """Return what people found in the random sample of what passes, of all models or of one.

        An image counts once. What an engineer approved it as counts first; if people disagree, it
        counts as a defect. That a label is rejected only keeps the image out of training.
        """
        answers: dict[str, set[str]] = {}
        approved: dict[str, str] = {}
        for one in self.labels():
            if one.waits == "audit" and (model is None or one.model == model):
                key = f"{one.verdict_id} {one.content}"
                answers.setdefault(key, set()).add(one.label)
                if one.approved_as:
                    approved[key] = one.approved_as
        found = [{approved[key]} if key in approved else said for key, said in answers.items()]
        defects = sum(POSITIVE in said for said in found)
        return Sample(defects, sum(bool(said & set(CLASSES)) for said in found))

    def overrides(self) -> Mapping[tuple[str, str], int]:
        """Return how often labels contradict verdicts, by verdict and label."""
        return Counter((one.verdict, one.label) for one in self.labels() if one.corrects)

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Let nobody change labels during the block."""
        with self._locked():
            yield

    @staticmethod
    def _undecided(labels: list[Label], label_id: str) -> Label:
        label = _find(labels, label_id)
        if label.state != "waiting":
            raise Refused(f"This label was {label.state} already, by {label.decided_by}")
        return label

    @staticmethod
    def _decide(
        labels: list[Label], label: Label, state: State, by: str, approved_as: str = ""
    ) -> Label:
        decided = replace(
            label, state=state, approved_as=approved_as, decided_by=by, decided_at=_now()
        )
        labels[labels.index(label)] = decided
        return decided

    def _take_out(self, label: Label, labels: list[Label]) -> None:
        """Take out of training what an approval left there that was cut off."""
        for name in CLASSES:
            if not any(one.image == label.image and one.approved_as == name for one in labels):
                with suppress(OSError):
                    (self.data / FIELD / name / label.image).unlink(missing_ok=True)

    @contextmanager
    def _changing(self) -> Iterator[list[Label]]:
        """Lock the table and yield its labels; write them if the block succeeds.

        Images of which no label waits any more are then deleted from the inbox.
        """
        with self._locked():
            table = self.folder / TABLE
            labels = _read(table) if table.exists() else []
            before = list(labels)
            yield labels
            if len(labels) == len(before) + 1:  # the usual change, which costs no more with more
                self._append(labels[-1], new=not before)
            elif labels != before:
                with replace_atomically(table) as temporary:
                    temporary.write_text(csv_text([COLUMNS, *map(_row, labels)]), encoding="utf-8")
                for image in _waiting(before) - _waiting(labels):
                    with suppress(OSError):
                        (self.folder / image).unlink(missing_ok=True)

    def _append(self, label: Label, new: bool) -> None:
        """Add a row in one write, at the end of a table that ends with a whole row."""
        table = self.folder / TABLE
        rows = csv_text([*([COLUMNS] if new else []), _row(label)])
        try:
            with table.open("ab") as file:
                file.write(rows.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise PipelineError(f"{table}: cannot be written ({error.strerror})") from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise PipelineError(f"{self.folder}: cannot be written ({error.strerror})") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


def order_for_decision(labels: list[Label], photograph: Callable[[Label], str]) -> list[Label]:
    """Return the labels that wait: contradicting ones first, then corrections, then the rest.

    Args:
        labels: all labels.
        photograph: names the photograph that a label's image comes from.
    """
    waiting = [one for one in labels if one.state == "waiting"]
    counts = Counter(photograph(one) for one in waiting)
    against = contradictions(labels, photograph)

    def rank(label: Label) -> tuple[bool, bool, bool, str, str]:
        photo = photograph(label)
        return label.id not in against, not label.corrects, counts[photo] < 2, photo, label.at

    return sorted(waiting, key=rank)


def contradictions(
    labels: list[Label], photograph: Callable[[Label], str]
) -> dict[str, list[Label]]:
    """Return, by the id of a label, those of the same photograph that say another class.

    Args:
        labels: all labels; rejected ones do not count.
        photograph: names the photograph that a label's image comes from.
    """
    together: dict[str, list[Label]] = {}
    for one in labels:
        if one.state != "rejected":
            together.setdefault(photograph(one), []).append(one)
    found = {}
    for same in together.values():
        for one in same:
            said = one.approved_as or one.label
            others = [o for o in same if {said, o.approved_as or o.label} == set(CLASSES)]
            if others:
                found[one.id] = others
    return found


def same_image(one: Label, other: Label) -> bool:
    """Return whether two labels are about one image of the verdict log.

    The log may have been deleted, and have begun to count anew.
    """
    return (one.verdict_id, one.content) == (other.verdict_id, other.content)


def _waiting(labels: list[Label]) -> set[str]:
    return {one.image for one in labels if one.state == "waiting"}


def _row(label: Label) -> list[str]:
    return [defused(getattr(label, name)) for name in COLUMNS]


def _learnable(source: Path) -> bytes:
    try:
        content = preprocessing.read_file(source)
        preprocessing.decode_within(content, 64)
    except UnreadableImage as error:
        raise Refused(f"{source.name} {error}, so there is nothing to learn from") from error
    return content


def _find(labels: list[Label], label_id: str) -> Label:
    for label in labels:
        if label.id == label_id:
            return label
    raise Refused("There is no such label any more")


def _read(table: Path) -> list[Label]:
    try:
        rows = list(csv.reader(io.StringIO(table.read_text(encoding="utf-8-sig"), newline="")))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise PipelineError(f"{table}: cannot be read ({error})") from error
    if not rows or rows[0] != COLUMNS:
        raise PipelineError(f"{table}: its first line must be {','.join(COLUMNS)}")
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(COLUMNS):
            raise PipelineError(f"{table} line {number}: has {len(row)} columns")
    return [Label(*map(restored, row)) for row in rows[1:]]


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
