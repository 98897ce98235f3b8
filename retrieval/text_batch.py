"""Tokenised captions as tensors: what the Q-Former and the losses take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .preprocess import TokenisedTexts


@dataclass(frozen=True, eq=False)
class TextBatch:
    """Captions as tensors, padded to the longest of the batch."""

    token_ids: Tensor  # (B, T), int64
    mask: Tensor  # (B, T), bool, True where there is a token

    @staticmethod
    def of(texts: TokenisedTexts) -> TextBatch:
        """Return what a `TextTransform` gave as tensors."""
        return TextBatch(torch.from_numpy(texts.token_ids), torch.from_numpy(texts.mask))

    def to(self, device: torch.device) -> TextBatch:
        """Return the batch on another device."""
        return TextBatch(self.token_ids.to(device), self.mask.to(device))

    def select(self, rows: Tensor) -> TextBatch:
        """Return some of the captions; `rows` (B',) are their numbers."""
        return TextBatch(self.token_ids[rows], self.mask[rows])

    def unpadded(self) -> list[tuple[int, ...]]:
        """Return the token ids of each caption without padding: what tells them apart."""
        lengths = self.mask.sum(dim=1).tolist()
        return [tuple(ids[:n]) for ids, n in zip(self.token_ids.tolist(), lengths, strict=True)]

    def padded(self, length: int) -> TextBatch:
        """Return the batch padded further, to so many tokens."""
        more = (0, length - self.token_ids.shape[1])
        return TextBatch(F.pad(self.token_ids, more), F.pad(self.mask, more))

    @staticmethod
    def concatenate(parts: Sequence[TextBatch]) -> TextBatch:
        """Return the captions of batches of one length, one after the other."""
        return TextBatch(
            torch.cat([part.token_ids for part in parts]), torch.cat([part.mask for part in parts])
        )
