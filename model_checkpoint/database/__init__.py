"""Experiments, metrics and checkpoints in a relational database."""

from model_checkpoint.database.enhanced_connection import EnhancedDatabaseConnection

__all__ = ["EnhancedDatabaseConnection"]
