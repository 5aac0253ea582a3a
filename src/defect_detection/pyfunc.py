"""The loader module that versions registered before `runtime` existed name in their MLmodel."""

from defect_detection.runtime.pyfunc import _load_pyfunc

__all__ = ["_load_pyfunc"]
