"""What each script would do again; the server that forks their processes imports it last."""

import gc

from mlflow.utils import requirements_utils

# Reads the files of every installed package, when a model is logged.
requirements_utils._init_modules_to_packages_map()
# A search for garbage would go through all of TensorFlow's objects, and copy their pages.
gc.collect()
gc.freeze()
