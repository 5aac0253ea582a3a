"""What judges images: it needs no TensorFlow, MLflow or SciPy and is saved beside every model."""
