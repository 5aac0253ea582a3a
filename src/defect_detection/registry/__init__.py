"""MLflow: the tracking store, saved models, versions and the alias of production."""

import os

# MLflow reads these when it is imported, so this package is imported before it.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # plants may have no internet
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")
# Retries then last half a minute; by default they last more than four minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "4")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # for files of 1 MB
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # without git a run only lacks its commit
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
