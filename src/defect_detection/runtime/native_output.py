"""What native libraries print past Python."""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def suppressed() -> Iterator[None]:
    """Suppress what C++ code writes to standard error; print it if the block fails.

    TensorFlow's converter and LiteRT print greetings there, and no setting turns them off.
    """
    sys.stderr.flush()
    original = os.dup(2)
    with tempfile.TemporaryFile() as captured:
        os.dup2(captured.fileno(), 2)
        try:
            yield
        except BaseException:
            captured.seek(0)
            os.write(original, captured.read())
            raise
        finally:
            os.dup2(original, 2)
            os.close(original)


def silence_tensorflow() -> None:
    """Turn TensorFlow's C++ logs off and make it Keras's backend; call this before the imports.

    The logs tell about missing GPUs and double registrations. Errors are raised in Python too.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
