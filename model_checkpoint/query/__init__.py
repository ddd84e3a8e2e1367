"""Filters in words: a text, a tree, SQL."""

from model_checkpoint.query.compiler import Compiled, compile_columns, compile_filter, compile_order
from model_checkpoint.query.language import parse

__all__ = ["Compiled", "compile_columns", "compile_filter", "compile_order", "parse"]
