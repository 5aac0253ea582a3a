"""Memory that is given back to the system after large images."""

import ctypes
from contextlib import suppress

# Numbers of glibc's mallopt(3), and bytes.
TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8
LARGE = 256 * 1024


def give_back() -> None:
    """Let glibc give back what is freed; elsewhere than on Linux, nothing changes.

    By default each of the server's threads gets memory of its own, which is cut into pieces by
    images of all sizes and never given back: after ten thousand images, 136 MB.
    """
    with suppress(OSError, AttributeError):  # another C library, such as macOS's
        libc = ctypes.CDLL(None)
        libc.mallopt(ARENA_MAX, 2)
        libc.mallopt(MMAP_THRESHOLD, LARGE)
        libc.mallopt(TRIM_THRESHOLD, LARGE)
