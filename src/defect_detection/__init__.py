"""Finds defects in images of castings: what the scripts of the pipeline share."""


class PipelineError(Exception):
    """An error that the user can fix; its message says what, where and how, in one line."""


class StoreError(PipelineError):
    """The tracking store cannot be reached, read or written."""
