"""How models are called."""

from __future__ import annotations

import os

DEFAULT_MODEL = "mini"
SHORT_NAMES = {
    "blip2-itm-vit-g": "Salesforce/blip2-itm-vit-g",
    "blip2-itm-vit-g-coco": "Salesforce/blip2-itm-vit-g-coco",
}
NAMES = (DEFAULT_MODEL, *SHORT_NAMES)  # these win over a folder of the same name
OPEN_CLIP = "open_clip:"  # before the name of a dual encoder


def canonical(name: str) -> str:
    """Return a name that means the same everywhere: an existing path becomes absolute."""
    return os.path.abspath(name) if name not in NAMES and os.path.exists(name) else name
