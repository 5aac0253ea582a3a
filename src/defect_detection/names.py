"""Names of files, which may hold any bytes, and errors, as they can be shown in a line."""


def printable(text: str, most: int | None = None) -> str:
    r"""Return a text with its control characters, and bytes that are not UTF-8, as in a shell.

    A name such as 'a\nb' would look like two lines, and others rewrite what a terminal shows.

    Args:
        text: to show in a line.
        most: characters that are kept; None for all.
    """
    some = text if most is None else text[: most + 1]
    shown = "".join(one if one.isprintable() else _escaped(one) for one in some)
    return shown if most is None or len(shown) <= most else shown[: most - 3] + "..."


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its kind if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def is_utf8(text: str) -> bool:
    """Return whether the bytes of a name are UTF-8."""
    return text.encode(errors="replace").decode() == text


def _escaped(character: str) -> str:
    # Python holds the byte ff of a name that is not UTF-8 as the character udcff.
    return ascii(character)[1:-1].replace("\\udc", "\\x")
