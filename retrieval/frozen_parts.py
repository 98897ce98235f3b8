"""The parts of a model that are not trained, at less cost than passing through them each time.

Of an image encoder, all of it or in fine-tuning its lower stages, where resolution is highest: every
image of training passes through, and on a CPU ONNX Runtime takes a third of the time of eager PyTorch.
Of a frozen text half, what it makes of a caption is always the same: it is computed once.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .encoders import TimmEncoder
from .model import Precision, RetrievalModel
from .onnx_export import can_export, onnx_graph
from .onnx_sessions import open_session
from .preprocess import TextTransform
from .progress import OnProgress
from .text_batch import TextBatch

log = logging.getLogger(__name__)

IMAGES_AT_ONCE = 32
CAPTIONS_AT_ONCE = 256


class FrozenPart:
    """A function of an encoder and pixels, at the encoder's weights of now."""

    def __init__(
        self, encoder: TimmEncoder, function: Callable[[TimmEncoder, Tensor], Tensor]
    ) -> None:
        """Take an encoder on the CPU; its part is exported when the first images come."""
        self._encoder, self._function = encoder, function
        self._sessions: dict[torch.Size, Any] = {}  # by (3, S, S)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return the function of pixels (N, 3, S, S), all on the CPU in float32."""
        size = pixels.shape[1:]
        if size not in self._sessions:
            self._sessions[size] = self._export(size)
        parts = [
            torch.from_numpy(self._sessions[size].run(None, {"pixels": part.numpy()})[0])
            for part in torch.split(pixels, IMAGES_AT_ONCE)
        ]
        return torch.cat(parts)

    def _export(self, size: torch.Size) -> Any:
        pixels = {"pixels": torch.zeros(2, *size)}
        sizes = {"pixels": {0: torch.export.Dim("images", min=1, max=65536)}}
        training = self._encoder.training
        graph = onnx_graph(self._encoder, self._function, pixels, sizes, ["features"])
        self._encoder.train(training)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "part.onnx"
            file.write_bytes(graph.SerializeToString())
            return open_session(file, kept=None)


class FrozenStages(NamedTuple):
    """The stages below those that are trained: `encoder.upper(run(pixels), blocks)` are the tokens."""

    run: FrozenPart
    blocks: int


def frozen_stages(model: RetrievalModel, precision: Precision) -> FrozenStages | None:
    """Return the stages of a model's encoder that no gradient reaches, where that is faster.

    None where `frozen_encoder` is PyTorch's, and for networks that are no EfficientNets.
    """
    encoder = model.image_encoder
    if not isinstance(encoder, TimmEncoder) or not (blocks := encoder.frozen_blocks):
        return None
    if not _is_faster(model, precision):
        return None
    return FrozenStages(FrozenPart(encoder, lambda e, pixels: e.lower(pixels, blocks)), blocks)


def frozen_encoder(model: RetrievalModel, precision: Precision) -> Callable[[Tensor], Tensor]:
    """Return what encodes pixels (N, 3, S, S) to tokens (N, P, D) fastest, without gradients.

    That is PyTorch on a GPU, in other arithmetic than fp32, for encoders that are not timm's, and
    without the packages of the `onnx` extra.
    """
    encoder = model.image_encoder
    if isinstance(encoder, TimmEncoder) and _is_faster(model, precision):
        return FrozenPart(encoder, TimmEncoder.forward)
    return model.encode_pixels


def _is_faster(model: RetrievalModel, precision: Precision) -> bool:
    if model.device.type != "cpu" or model.dtype != torch.float32 or precision != "fp32":
        return False
    if not can_export():
        log.warning("encoding would be faster with ONNX Runtime: pip install 'blip2-search[onnx]'")
        return False
    return True


class FrozenTexts:
    """The [CLS] states of all captions of a run, under a text half that stays as it is."""

    @torch.no_grad()
    def __init__(
        self,
        model: RetrievalModel,
        captions: Iterable[str],
        text_transform: TextTransform,
        on_progress: OnProgress | None = None,
    ) -> None:
        """Encode the captions without dropout, always in the same company: a resumed run gets the same bits."""
        text = TextBatch.of(text_transform(sorted(set(captions))))
        order = torch.argsort(text.mask.sum(dim=1), stable=True)
        self._rows: dict[tuple[int, ...], int] = {}
        states: list[Tensor] = []
        done, training = 0, model.training
        model.eval()
        for rows in torch.split(order, CAPTIONS_AT_ONCE):
            part = text.select(rows).trimmed()
            self._rows |= {key: done + i for i, key in enumerate(part.unpadded())}
            states.append(model.text_states(part.to(model.device)))
            done += len(rows)
            if on_progress is not None:
                on_progress(done, len(order))
        model.train(training)
        self._states = torch.cat(states)

    def __call__(self, text: TextBatch) -> Tensor:
        """Return what `RetrievalModel.text_states` would of captions (B, T) that are among them: (B, H)."""
        return self._states[[self._rows[key] for key in text.unpadded()]]
