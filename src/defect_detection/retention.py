"""How much is kept of what the line writes; it is read without pydantic, too."""

from dataclasses import dataclass
from typing import Any, ClassVar

FOLDER = ".line"  # of what is kept of the line, if nothing names another


@dataclass(frozen=True)
class Retention:
    """What the verdict log keeps; the oldest goes first.

    Attributes:
        verdicts: how many.
        days: for how long.
        megabytes: of images, which are kept for review and for training.
    """

    verdicts: int = 200_000
    days: int = 90
    megabytes: int = 5_000

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    def __post_init__(self) -> None:
        """Refuse to keep nothing."""
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
