"""Keys and values of images that were candidates lately, kept where the model computes.

What cross-attention makes of an image is the same for every text: at the published size two fifths of a
pair's arithmetic, and 2.4 million numbers an image. A candidate that comes again costs the rest alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
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
            logits |= zip(
                rows, self._match(text, self._again([names[row] for row in rows])), strict=True
            )
        for rows in self._passes(sorted(tokens)):
            new = self._project(np.stack([tokens[row] for row in rows]))
            for row, one in zip(rows, new, strict=True):
                self._keep(names[row], one)
            logits |= zip(rows, self._match(text, new), strict=True)
        return logits

    def _passes(self, rows: list[int]) -> Iterator[list[int]]:
        size = self._model.pairs_at_once
        return (rows[start : start + size] for start in range(0, len(rows), size))

    def _again(self, names: list[str]) -> Tensor:
        for name in names:
            self._kept.move_to_end(name)
        return torch.stack([self._kept[name] for name in names])

    def _project(self, tokens: npt.NDArray[Any]) -> Tensor:
        """Return keys and values (B, layers, 2, heads, P, H / heads) of tokens (B, P, D)."""
        layers = self._model.image_keys_values(torch.from_numpy(tokens))
        return torch.stack([torch.stack(layer, 1) for layer in layers if layer is not None], 1)

    def _keep(self, name: str, keys_values: Tensor) -> None:
        old = self._kept.pop(name, None)
        self._kept[name] = keys_values.clone()  # not a view, which would hold its whole batch
        self.nbytes += keys_values.nbytes - (0 if old is None else old.nbytes)
        while self.nbytes > self._memory:
            self.nbytes -= self._kept.popitem(last=False)[1].nbytes

    def _match(self, text: str, keys_values: Tensor) -> list[float]:
        seen = iter(keys_values.unbind(1))
        image: list[KeyValue | None] = []
        for layer in self._model.qformer.layers:
            keys, values = (None, None) if layer.cross_attention is None else next(seen).unbind(1)
            image.append(None if keys is None else (keys, values))
        one = torch.zeros(len(keys_values), dtype=torch.int64, device=keys_values.device)
        logits = self._model.match_logits(image, self._model.tokenize([text]), text_of=one)
        found: list[float] = logits[:, MATCH].float().tolist()
        return found
