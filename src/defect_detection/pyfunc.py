"""The module by which MLflow loads versions of all times, named in each MLmodel."""

from defect_detection.runtime.pyfunc import _load_pyfunc

__all__ = ["_load_pyfunc"]
