"""`blip2-search models`."""

from __future__ import annotations

import json
from pathlib import Path

from . import options, render

# Of the published checkpoints: image size, and what there is to say about them.
_PUBLISHED = {
    "blip2-itm-vit-g": (224, "ViT-g, 1.2 billion parameters"),
    "blip2-itm-vit-g-coco": (364, "the same, fine-tuned on COCO for retrieval: the paper's"),
}


def models(*, verbose: options.VerboseOption = False) -> None:
    """List the models that `index --model` knows by name.

    Examples:
      blip2-search models
      blip2-search index ~/Pictures --model blip2-itm-vit-g --index ~/big-index
    """
    from ..retrieval.names import DEFAULT_MODEL, SHORT_NAMES
    from ..retrieval.own_format import EMBEDDED

    rows = [_embedded(DEFAULT_MODEL, EMBEDDED / DEFAULT_MODEL)]
    for short, full in SHORT_NAMES.items():
        pixels, remark = _PUBLISHED[short]
        rows.append((short, f"{pixels} px", f"hub, {full}: {remark}"))
    render.print_models(rows)
    render.say(
        "--model also takes a folder (our format or transformers'), another hub name (OWNER/NAME)\n"
        "and a LAVIS stage-1 checkpoint (FILE.pth). What comes from the hub is downloaded when it is\n"
        "first used, about 5 GB. An index remembers its model: `query` needs no --model."
    )


def _embedded(name: str, folder: Path) -> tuple[str, str, str]:
    weights, config = folder / "model.safetensors", folder / "config.json"
    if not (weights.exists() and config.exists()):
        return name, "-", f"missing from this installation: there is no model in {folder}"
    pixels = json.loads(config.read_text(encoding="utf-8"))["preprocess"]["image_size"]
    return name, f"{pixels} px", f"embedded, {render.size(weights.stat().st_size)}: the default"
