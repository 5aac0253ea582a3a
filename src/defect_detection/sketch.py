"""Whether two sets of images have one in common, by a short text about each.

The text is a bottom-k sketch (Broder, On the resemblance and containment of documents, 1997): the
smallest of the contents' hashes, which are a random sample of the contents.
"""

from collections.abc import Iterable

SIZE = 500  # hashes; MLflow's tags hold 5000 characters
LENGTH = 8  # hexadecimal digits of a hash


def of(contents: Iterable[str]) -> str:
    """Return the sketch of contents, which are named by their SHA-256."""
    return "".join(sorted({content[:LENGTH] for content in contents})[:SIZE])


def share(one: str, other: str) -> bool:
    """Return whether the sets of two sketches probably have a content in common.

    Sets that have less than a hundredth in common may be taken for sets without.
    """
    return bool(_hashes(one) & _hashes(other))


def _hashes(sketch: str) -> set[str]:
    return {sketch[start : start + LENGTH] for start in range(0, len(sketch), LENGTH)}
