"""The HTTP API and the retraining jobs that it starts."""
