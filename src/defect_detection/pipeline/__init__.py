"""The steps of the scripts: compute, record in MLflow, tell on the terminal."""
