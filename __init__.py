"""blip2-search: image-text retrieval and search on BLIP-2.

The public names are loaded when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blip2_search.indexes.errors import Blip2SearchError
    from blip2_search.retrieval.checkpoints import save_model
    from blip2_search.retrieval.data import read_split
    from blip2_search.retrieval.engine import Hit, IndexReport, SearchEngine
    from blip2_search.retrieval.evaluation import evaluate
    from blip2_search.retrieval.loading import load_embedder, load_model
    from blip2_search.retrieval.model import RetrievalModel
    from blip2_search.retrieval.report import RetrievalReport

__version__ = "0.1.0"

_HOMES = {
    "Blip2SearchError": "indexes.errors",
    "Hit": "retrieval.engine",
    "IndexReport": "retrieval.engine",
    "RetrievalModel": "retrieval.model",
    "RetrievalReport": "retrieval.report",
    "SearchEngine": "retrieval.engine",
    "evaluate": "retrieval.evaluation",
    "load_embedder": "retrieval.loading",
    "load_model": "retrieval.loading",
    "read_split": "retrieval.data",
    "save_model": "retrieval.checkpoints",
}

__all__ = [
    "Blip2SearchError",
    "Hit",
    "IndexReport",
    "RetrievalModel",
    "RetrievalReport",
    "SearchEngine",
    "__version__",
    "evaluate",
    "load_embedder",
    "load_model",
    "read_split",
    "save_model",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its home (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'blip2_search' has no attribute {name!r}")
    return getattr(import_module(f"blip2_search.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
