"""How a model is fitted. Only this package imports TensorFlow at the top of its modules."""
