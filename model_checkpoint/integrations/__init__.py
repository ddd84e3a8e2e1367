"""Other tools: importers of their runs, which need the standard library only, and a module for each framework.

Importing ``lightning``, ``accelerate``, ``transformers``, ``keras`` or ``optuna`` from here imports that framework.
"""

from model_checkpoint.integrations.mlflow_importer import import_mlflow
from model_checkpoint.integrations.tensorboard_importer import import_tensorboard
from model_checkpoint.integrations.trackio_importer import import_trackio

__all__ = ["import_mlflow", "import_tensorboard", "import_trackio"]
