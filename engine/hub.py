"""A model named as on the Hugging Face hub ("org/name"), brought to a local folder. Needs the `hub` extra."""

from __future__ import annotations

import re
from pathlib import Path

from engine.errors import CheckpointError

HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
WANTED = ["*.json", "*.safetensors", "*.jinja"]  # no code, no pickles


def local_folder(model: str | Path) -> Path:
    """`model` itself where it is there; else, for the name of a hub model, the folder it was downloaded to.

    Raises CheckpointError where it can be neither. Nothing that is downloaded is ever executed.
    """
    path = Path(model)
    if path.exists() or not HUB_NAME.fullmatch(str(model)):
        return path  # whoever opens it says what is wrong with it
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"{model}: there is no such folder; to fetch a model of that name from the hub, "
            "pip install 'mla-server[hub]'"
        ) from None
    try:
        return Path(snapshot_download(str(model), allow_patterns=WANTED))
    except Exception as error:  # the library raises many kinds, all of them about the name or the network
        raise CheckpointError(f"{model}: there is no such folder, and the hub says: {error}") from None
