"""Where exported models lie, and whether they are still what they were exported from.

`mini` comes exported. Other models are exported into the user's cache, a folder a name, by
`onnx_export.py`; one that is incomplete, or whose checkpoint has changed since, counts as none.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from .cache import cache_folder
from .errors import CheckpointError
from .names import DEFAULT_MODEL, NAMES, SHORT_NAMES, canonical
from .own_format import EMBEDDED, FILES, read_config, read_json

DESCRIPTION = "onnx.json"
FORMAT = 2  # of the description and the graphs' inputs and outputs
GRAPHS = ("encoder", "queries", "texts")  # and "match", where there is an ITM head
_READ = (".json", ".safetensors", ".bin", ".pth", ".txt")  # what of a checkpoint's folder is read


def find_export(name: str) -> Path | None:
    """Return the folder of an exported model; None where there is none, or its model has changed."""
    folder = export_folder(name)
    try:
        description, config = read_json(folder / DESCRIPTION), read_config(folder)
    except CheckpointError:
        return None
    graphs = (*GRAPHS, "match") if config.itm_head else GRAPHS
    files = (*FILES, *(f"{graph}.onnx" for graph in graphs))
    wanted = {"format": FORMAT, "name": canonical(name), "sources": sources(name)}
    whole = all((folder / file).exists() for file in files) and "fingerprint" in description
    return folder if whole and wanted.items() <= description.items() else None


def export_folder(name: str) -> Path:
    """Return where a model's export lies, or would."""
    if name == DEFAULT_MODEL:
        return EMBEDDED / name
    digest = hashlib.blake2b(canonical(name).encode(), digest_size=8).hexdigest()
    return cache_folder() / "onnx" / digest


def sources(name: str) -> dict[str, list[int]]:
    """Return the files that a model is loaded from, with size and time.

    Of a model on the hub it is the configuration in the local cache, whose path names the revision;
    {} for the embedded one.
    """
    path = Path(canonical(name))
    if name == DEFAULT_MODEL:
        return {}
    if name in NAMES or not path.exists():
        files = _on_the_hub(SHORT_NAMES.get(name, name))
    else:
        files = sorted(path.parent.glob("tokenizer.json")) if path.is_file() else []
        files += [path] if path.is_file() else sorted(path.iterdir())
    kept = [file for file in files if file.suffix in _READ and file.is_file()]
    stats = {str(file): os.stat(file) for file in kept}
    return {file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()}


def _on_the_hub(repository: str) -> list[Path]:
    """Return the configuration of a hub's model, where it has been downloaded."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(repository, "config.json")
    except HFValidationError:  # no name of the hub: loading it will say so
        return []
    return [Path(found)] if isinstance(found, str) else []
