"""Who a checkpoint directory is: ``.engine/format.json``, with the format's version and the directory's own id."""

from __future__ import annotations

import json
import os
import uuid

from model_checkpoint.errors import ConfigurationError, FormatVersionError
from model_checkpoint.integrity.writing import write_bytes

FORMAT_VERSION = 1


def identify(engine: str) -> str:
    """Return the id of the checkpoint directory whose ``.engine`` folder this is; a new one gets an id.

    Raises:
        ConfigurationError: what is there is damaged.
        FormatVersionError: a newer version of this package wrote it.
        OSError: it cannot be read or written.
    """
    name = os.path.join(engine, "format.json")
    if not os.path.exists(name):
        mine = f"{name}.{uuid.uuid4()}"
        write_bytes(mine, stamp())
        try:
            os.link(mine, name)  # of several processes that open a new directory, the first one names it
        except FileExistsError:
            pass
        finally:
            os.unlink(mine)
    with open(name, "rb") as file:
        try:
            content = json.load(file)
            version, store_id = int(content["format_version"]), str(uuid.UUID(content["store_id"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(
                f"{name} is damaged ({error}); restore it from a copy, or move it away: a new one is made and the "
                "checkpoints are found again by their manifests"
            ) from error
    if version > FORMAT_VERSION:
        raise FormatVersionError(f"checkpoint directory {os.path.dirname(engine)}", version, FORMAT_VERSION)
    return store_id


def stamp() -> bytes:
    """Return the content of ``format.json`` for a directory that is new, or distinct from now on."""
    return json.dumps({"format_version": FORMAT_VERSION, "store_id": str(uuid.uuid4())}).encode()
