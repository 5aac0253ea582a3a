"""MLflow: the tracking store, saved models, versions and the alias of production."""
