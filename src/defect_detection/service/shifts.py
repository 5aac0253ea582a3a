"""When shifts begin and end, in local time."""

from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta


def began(begin: Sequence[str], now: datetime) -> datetime:
    """Return when the present shift began.

    Args:
        begin: when shifts begin, such as "06:00".
        now: with a zone.
    """
    return max(one for one in _near(begin, now) if one <= now)


def next_after(begin: Sequence[str], now: datetime) -> datetime:
    """Return when the next shift begins; arguments as for `began`."""
    return min(one for one in _near(begin, now) if one > now)


def _near(begin: Sequence[str], now: datetime) -> Iterator[datetime]:
    local = now.astimezone()
    for text in begin:
        hour, minute = map(int, text.split(":"))
        for days in (-1, 0, 1):
            day = local + timedelta(days=days)
            # Without a zone first, so that a change to summer time in between counts.
            naive = day.replace(tzinfo=None, hour=hour, minute=minute, second=0, microsecond=0)
            yield naive.astimezone()
