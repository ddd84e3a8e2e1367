"""Bringing runs along from other tools; each importer needs nothing but the standard library."""

from model_checkpoint.integrations.mlflow_importer import import_mlflow
from model_checkpoint.integrations.tensorboard_importer import import_tensorboard
from model_checkpoint.integrations.trackio_importer import import_trackio

__all__ = ["import_mlflow", "import_tensorboard", "import_trackio"]
