"""Where the project keeps what it can make again."""

from __future__ import annotations

from pathlib import Path


def cache_folder() -> Path:
    """Return the project's folder in the user's cache."""
    from platformdirs import user_cache_path

    return user_cache_path("blip2-search", appauthor=False)
