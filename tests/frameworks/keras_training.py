"""What a user's script looks like, run by ``test_keras.py``: backend, folder, and after which batch it is killed.

It prints the digest of all that was trained, the history and the epochs that ``fit`` returned.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import sys

backend, folder, kill_at, form = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
os.environ["KERAS_BACKEND"] = backend

import keras  # noqa: E402 - its backend is chosen before it is imported
import numpy as np  # noqa: E402

from model_checkpoint.integrations.keras import CheckpointCallback  # noqa: E402

logging.basicConfig(level=logging.INFO)


class Batches(keras.utils.PyDataset):
    """The batches of two arrays, which ``fit`` shuffles."""

    def __init__(self, x: np.ndarray, y: np.ndarray) -> None:
        super().__init__()
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x) // 8

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        return self.x[8 * i : 8 * i + 8], self.y[8 * i : 8 * i + 8]


class Killed(keras.callbacks.Callback):
    """Ends the process as the kernel does when memory is short."""

    def __init__(self) -> None:
        super().__init__()
        self.batches = 0

    def on_train_batch_end(self, batch: int, logs: object = None) -> None:
        self.batches += 1
        if self.batches == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


keras.utils.set_random_seed(3)
rng = np.random.default_rng(0)
x = rng.normal(size=(53, 6)).astype("float32")
y = (x.sum(1) > 0).astype("int64")

layers = [keras.layers.Dense(8, activation="relu"), keras.layers.BatchNormalization(), keras.layers.Dropout(0.4)]
model = keras.Sequential([keras.Input((6,)), *layers, keras.layers.Dense(2)])
optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01)) if form == "steps" else "adam"
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
model.compile(optimizer, loss, metrics=["accuracy"], steps_per_execution=3 if form == "steps" else 1)

plateau = keras.callbacks.ReduceLROnPlateau(patience=1, min_delta=10.0)  # nothing is that much better: it always acts
saving = CheckpointCallback(folder, every_n_batches=2, also=[plateau])
given = {"callbacks": [Killed(), plateau, saving], "epochs": 4, "verbose": 0}
if form == "dataset":
    history = model.fit(Batches(x, y), validation_data=(x[:9], y[:9]), **given)
else:
    history = model.fit(x, y, batch_size=8, validation_split=0.2, **given)

digest = hashlib.sha256()
for variable in [*model.variables, *model.optimizer.variables]:
    digest.update(keras.ops.convert_to_numpy(variable.value).tobytes())
print(json.dumps([digest.hexdigest(), history.history, history.epoch]))
