"""YAML read strictly: each value means one thing only, and is written out once."""

import re
from collections.abc import Iterator
from typing import Any, NoReturn

import yaml

from defect_detection import PipelineError

DEEPEST = 20  # levels; the configurations have four

# What a text without quotes stands for, as in YAML 1.2; YAML 1.1 also reads yes, 012 and 1:30.
_WORDS: dict[str, Any] = dict.fromkeys(("", "~", "null", "Null", "NULL"))
_WORDS |= dict.fromkeys(("true", "True", "TRUE"), True)
_WORDS |= dict.fromkeys(("false", "False", "FALSE"), False)
_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})")
_NUMBER = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")


def read(text: str, name: str) -> Any:
    """Return the value of a YAML document: None, or dicts, lists, texts, numbers and truth values.

    Args:
        text: the document.
        name: of the file, with which errors begin.

    Raises:
        PipelineError: the text is no YAML, has a key twice, anchors, tags or a second document, or
            is too deep. The message names the line.
    """
    try:
        return _Reader(text, name).document()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise PipelineError(f"{name} line {line}: is not YAML: {error.reason}") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1
        raise PipelineError(f"{name} line {line}: is not YAML: {error.problem}") from error


class _Reader:
    """Builds values from the events of PyYAML's parser.

    PyYAML's own loader follows aliases, keeps the last of two values and calls itself for each
    level of the text.
    """

    def __init__(self, text: str, name: str):
        self.name = name
        self.events: Iterator[yaml.Event] = yaml.parse(text, Loader=yaml.SafeLoader)

    def document(self) -> Any:
        """Return the value of the one document, None if there is none."""
        next(self.events)  # the start of the stream
        if isinstance(next(self.events), yaml.StreamEndEvent):
            return None
        value = self.value(next(self.events), 0)
        next(self.events)  # the end of the document
        event = next(self.events)
        if not isinstance(event, yaml.StreamEndEvent):
            self.refuse(event, "a second document begins here. Keep one")
        return value

    def value(self, event: yaml.Event, depth: int) -> Any:
        """Return the value that begins with an event, at a depth of 0 or more."""
        self.check(event)
        if isinstance(event, yaml.ScalarEvent):
            return _plain(event.value) if event.implicit[0] else event.value
        if depth == DEEPEST:
            self.refuse(event, f"more than {DEEPEST} levels. Write it flatter")
        if isinstance(event, yaml.SequenceStartEvent):
            return [self.value(one, depth + 1) for one in self.until(yaml.SequenceEndEvent)]
        found: dict[str, Any] = {}
        for key in self.until(yaml.MappingEndEvent):
            self.check(key)
            if not isinstance(key, yaml.ScalarEvent):
                self.refuse(key, "expected a name before the colon")
            if key.value in found:
                self.refuse(key, f"{key.value!r} is written twice. Delete one")
            found[key.value] = self.value(next(self.events), depth + 1)
        return found

    def until(self, end: type[yaml.Event]) -> Iterator[yaml.Event]:
        """Yield the events before the end of a list or a mapping."""
        while not isinstance(event := next(self.events), end):
            yield event

    def check(self, event: yaml.Event) -> None:
        """Refuse what makes a value stand for another one."""
        if event.anchor is not None:  # of an alias too
            self.refuse(event, "& and * are not read here. Write the value out")
        if event.tag is not None:
            self.refuse(event, "tags such as !!int are not read here. Write the value alone")

    def refuse(self, event: yaml.Event, why: str) -> NoReturn:
        """Raise the error."""
        raise PipelineError(f"{self.name} line {event.start_mark.line + 1}: {why}")


def _plain(text: str) -> Any:
    if text in _WORDS:
        return _WORDS[text]
    if _WHOLE.fullmatch(text):
        return int(text)
    return float(text) if _NUMBER.fullmatch(text) else text
