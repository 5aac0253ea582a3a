"""How good a model is: figures with bounds, robustness, parity and the report."""
