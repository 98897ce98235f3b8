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
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .encoders import TimmEncoder
from .errors import first_line
from .model import Precision, RetrievalModel
from .onnx_export import can_export, onnx_graph
from .onnx_sessions import open_session
from .preprocess import TextTransform
from .progress import Prepare
from .text_batch import TextBatch

log = logging.getLogger(__name__)

IMAGES_AT_ONCE = 32
CAPTIONS_AT_ONCE = 256


class FrozenPart:
    """A function of an encoder and pixels, at the weights that it has when the first images come."""

    def __init__(
        self, encoder: TimmEncoder, function: Callable[[TimmEncoder, Tensor], Tensor]
    ) -> None:
        """Take an encoder on the CPU."""
        self._encoder, self._function = encoder, function
        self._sessions: dict[torch.Size, Any] = {}  # by (3, S, S); None where PyTorch has to do

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return the function of pixels (N, 3, S, S), all on the CPU in float32."""
        size = pixels.shape[1:]
        if size not in self._sessions:
            self._sessions[size] = self._export(size)
        session = self._sessions[size]
        if session is None:
            with torch.no_grad():
                return self._function(self._encoder, pixels)
        parts = [
            torch.from_numpy(session.run(None, {"pixels": part.numpy()})[0])
            for part in torch.split(pixels, IMAGES_AT_ONCE)
        ]
        return torch.cat(parts)

    def _export(self, size: torch.Size) -> Any:
        pixels = {"pixels": torch.zeros(2, *size)}
        sizes = {"pixels": {0: torch.export.Dim("images", min=1, max=65536)}}
        training = self._encoder.training
        try:
            graph = onnx_graph(self._encoder, self._function, pixels, sizes, ["features"])
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "part.onnx"
                file.write_bytes(graph.SerializeToString())
                return open_session(file, None, threads=torch.get_num_threads())
        except Exception as error:  # every layer of the exporter has errors of its own
            why = first_line(error)
            log.warning("PyTorch encodes, as ONNX Runtime cannot take the encoder: %s", why)
            return None
        finally:
            self._encoder.train(training)


class FrozenStages:
    """An encoder whose lower stages no gradient reaches: they are run as a `FrozenPart`."""

    def __init__(self, encoder: TimmEncoder) -> None:
        """Take an encoder on the CPU, with `frozen_blocks`."""
        blocks = encoder.frozen_blocks
        self._lower = FrozenPart(encoder, lambda e, pixels: e.lower(pixels, blocks))
        self._encoder, self._blocks = encoder, blocks

    def __call__(self, pixels: Tensor) -> Tensor:
        """Map (N, 3, S, S) to (N, P, D), as the encoder does."""
        return self._encoder.upper(self._lower(pixels), self._blocks)


def frozen_stages(model: RetrievalModel, precision: Precision) -> FrozenStages | None:
    """Return the model's encoder with its frozen stages in ONNX Runtime, where that is faster.

    None where `frozen_encoder` is, and for networks that are no EfficientNets.
    """
    encoder = model.image_encoder
    if not isinstance(encoder, TimmEncoder) or not encoder.frozen_blocks:
        return None
    return FrozenStages(encoder) if _is_faster(model, precision) else None


def frozen_encoder(model: RetrievalModel, precision: Precision) -> FrozenPart | None:
    """Return what encodes pixels (N, 3, S, S) to tokens (N, P, D) faster than PyTorch.

    None on a GPU, in other arithmetic than fp32, for encoders that are not timm's, and without the
    packages of the `onnx` extra.
    """
    encoder = model.image_encoder
    if not isinstance(encoder, TimmEncoder) or not _is_faster(model, precision):
        return None
    return FrozenPart(encoder, TimmEncoder.forward)


def _is_faster(model: RetrievalModel, precision: Precision) -> bool:
    if model.device.type != "cpu" or model.dtype != torch.float32 or precision != "fp32":
        return False
    if not can_export():
        log.warning("encoding would be faster with ONNX Runtime: pip install 'blip2-search[onnx]'")
        return False
    return True


class FrozenTexts:
    """The [CLS] states of all captions of a run, under a text half that stays as it is.

    They are computed when the first are asked for, without dropout and always in the same company, so
    that a resumed run gets the same bits.
    """

    def __init__(
        self,
        model: RetrievalModel,
        captions: Iterable[str],
        text_transform: TextTransform,
        prepare: Prepare | None = None,
    ) -> None:
        """Take the captions; `prepare` is called when they are encoded, and gives the progress callback."""
        self._model, self._captions, self._text_transform = model, captions, text_transform
        self._prepare = prepare or (lambda _: lambda done, total: None)
        self._rows: dict[tuple[int, ...], int] = {}  # of the states, by token ids
        self._states = torch.empty(0)

    def __call__(self, text: TextBatch) -> Tensor:
        """Return what `RetrievalModel.text_states` would of captions (B, T) that are among them: (B, H)."""
        if not self._rows:
            self._encode()
        states = self._states[[self._rows[key] for key in text.unpadded()]]
        return states.to(self._model.device)

    @torch.no_grad()
    def _encode(self) -> None:
        on_progress = self._prepare("Encoding captions")
        model, text = self._model, self._text_transform(sorted(set(self._captions)))
        order = np.argsort(text.mask.sum(axis=1), kind="stable")
        states: list[Tensor] = []
        training = model.training
        model.eval()
        for start in range(0, len(order), CAPTIONS_AT_ONCE):
            part = TextBatch.of(text.select(order[start : start + CAPTIONS_AT_ONCE]))
            states.append(model.text_states(part.to(model.device)).cpu())
            self._rows |= {key: start + i for i, key in enumerate(part.unpadded())}
            on_progress(start + len(part.mask), len(order))
        model.train(training)
        self._states = torch.cat(states)
