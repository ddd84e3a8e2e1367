"""TensorFlow's modules, checkpoints' object graphs and random generators: the variables that can be reached."""

from __future__ import annotations

from typing import Any

from model_checkpoint.checkpoint.objects import ObjectAdapter
from model_checkpoint.utils.optional import require


class TensorflowAdapter(ObjectAdapter):
    """``tf.Module``, ``tf.train.Checkpoint`` and ``tf.random.Generator``.

    A variable is called by the attributes that lead to it, as in TensorFlow's own checkpoints, such as ``layers.0.w``;
    one that several lead to, by the first of them.
    """

    def owns(self, value: object) -> bool:
        tf = require("tensorflow", "tensorflow", "saving an object of TensorFlow")  # its object is here: loaded
        return isinstance(value, (tf.Module, tf.train.Checkpoint, tf.random.Generator))

    def state_of(self, value: object) -> object:
        tf = require("tensorflow", "tensorflow", "saving an object of TensorFlow")
        found: dict[str, object] = {}
        seen: set[int] = set()

        def walk(node: Any, path: str) -> None:
            if id(node) in seen:
                return
            seen.add(id(node))
            if isinstance(node, tf.Variable):
                found[path] = node
                return
            if _keeps_more(tf, node):
                raise ValueError(
                    f"{path} is a {type(node).__name__}, whose content is in no variable; save that by itself, "
                    "such as a table's export(), and leave the object out"
                )
            for name, child in tf.train.TrackableView.children(node).items():
                walk(child, f"{path}.{name}" if path else name)

        walk(value, "")
        return found

    def put_back(self, value: object, state: Any) -> object:
        for name, variable in self.state_of(value).items():  # type: ignore[attr-defined]
            if state[name] is not variable:  # it was not filled where it is
                variable.assign(state[name])
        return value


def _keeps_more(tf: Any, node: object) -> bool:
    """Whether TensorFlow's own checkpoints hold more of an object than its variables: of a table, or an iterator."""
    plain = tf.Module
    names = ("_serialize_to_tensors", "_gather_saveables_for_checkpoint")
    return any(getattr(type(node), name, None) not in (None, getattr(plain, name, None)) for name in names)
