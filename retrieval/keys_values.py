"""Keys and values of images that were candidates lately, kept where the model computes.

What cross-attention makes of an image is the same for every text: at the published size two fifths of a
pair's arithmetic, and 2.4 million numbers an image. A candidate that comes again costs the rest alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .model import MATCH, RetrievalModel
from .qformer import KeyValue

TokensOf = Callable[[list[int]], Mapping[int, npt.NDArray[Any]]]


class KeptKeysValues:
    """The keys and values of images, by name; those not asked for longest make room."""

    def __init__(self, model: RetrievalModel, memory: int) -> None:
        """Keep at most `memory` bytes, on the model's device."""
        self._model, self._memory = model, memory
        # Of each image (layers that look at it, 2, heads, P, H / heads).
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self.nbytes = 0

    def __contains__(self, name: str) -> bool:
        """Whether an image's are kept."""
        return name in self._kept

    @torch.inference_mode()
    def match(self, text: str, names: Sequence[str], tokens_of: TokensOf) -> dict[int, float]:
        """Return the ITM logits "these match" of a text and images, by the images' places; raw.

        Args:
            text: the caption.
            names: of n images, such as hashes of their content.
            tokens_of: gives the encoder's tokens (P, D) of images whose keys and values are not kept, by
                their places; an image that it leaves out is left out here.
        """
        known = [row for row, name in enumerate(names) if name in self]
        tokens = tokens_of([row for row, name in enumerate(names) if name not in self])
        logits: dict[int, float] = {}
        for rows in self._passes(known):
            layers = self._layers([names[row] for row in rows])
            logits |= zip(rows, self._match(text, layers, len(rows)), strict=True)
        for rows in self._passes(sorted(tokens)):
            new = np.stack([tokens[row] for row in rows])
            projected = self._model.image_keys_values(torch.from_numpy(new))
            logits |= zip(rows, self._match(text, projected, len(rows)), strict=True)
            for i, row in enumerate(rows):
                # A copy, as a view would hold its whole batch.
                one = [torch.stack([kv[0][i], kv[1][i]]) for kv in projected if kv is not None]
                self._keep(names[row], torch.stack(one))
        return logits

    def _passes(self, rows: list[int]) -> Iterator[list[int]]:
        size = self._model.pairs_at_once
        return (rows[start : start + size] for start in range(0, len(rows), size))

    def _match(self, text: str, layers: Iterable[KeyValue | None], images: int) -> list[float]:
        one = torch.zeros(images, dtype=torch.int64, device=self._model.device)
        logits = self._model.match_logits(layers, self._model.tokenize([text]), text_of=one)
        found: list[float] = logits[:, MATCH].float().tolist()
        return found

    def _layers(self, names: list[str]) -> Iterator[KeyValue | None]:
        """Give kept keys and values by layer, when it is reached: all at once would be a second copy."""
        for name in names:
            self._kept.move_to_end(name)
        seen = zip(*(self._kept[name] for name in names), strict=True)
        for layer in self._model.qformer.layers:
            if layer.cross_attention is None:
                yield None
            else:
                images = next(seen)
                yield torch.stack([kv[0] for kv in images]), torch.stack([kv[1] for kv in images])

    def _keep(self, name: str, keys_values: Tensor) -> None:
        old = self._kept.pop(name, None)
        self._kept[name] = keys_values
        self.nbytes += keys_values.nbytes - (0 if old is None else old.nbytes)
        while self.nbytes > self._memory:
            self.nbytes -= self._kept.popitem(last=False)[1].nbytes
