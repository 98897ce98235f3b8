"""How long work tells whoever waits for it how far it has come."""

from __future__ import annotations

from collections.abc import Callable

OnProgress = Callable[[int, int], None]  # (done, to do)
Prepare = Callable[[str], OnProgress]  # announces a piece of work, and gives its progress callback
