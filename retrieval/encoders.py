"""Image encoders behind one small interface: pixels in, image tokens out.

A frozen encoder (the default, as in BLIP-2's stage 1) stays in evaluation mode and gets no gradient.
None applies a final LayerNorm: BLIP-2 trains its own, `ln_vision`, which belongs to the model.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import EncoderConfig
from .errors import CheckpointError


class ImageEncoder(nn.Module):
    """The interface: `forward(pixels (N, 3, S, S)) -> image tokens (N, P, D)`."""

    frozen = True

    def freeze(self, frozen: bool = True) -> None:
        """Switch gradients and training behaviour off (or on again)."""
        self.frozen = frozen
        self.requires_grad_(not frozen)
        self.train(not frozen)

    def train(self, mode: bool = True) -> ImageEncoder:
        """Enter training mode, unless frozen: then stay in evaluation mode."""
        return super().train(mode and not self.frozen)


class TimmEncoder(ImageEncoder):
    """A timm backbone: the last grid of a convolutional network, or a transformer's tokens."""

    def __init__(self, config: EncoderConfig) -> None:
        """Build the backbone without weights; `config.pool` averages the grid down."""
        import timm

        super().__init__()
        self.backbone: Any = timm.create_model(
            config.name, pretrained=False, num_classes=0, global_pool=""
        )
        self.backbone.to(memory_format=torch.channels_last)  # 1.5 times faster on CPUs
        self.pool = config.pool
        self.freeze()

    def forward(self, pixels: Tensor) -> Tensor:
        """Map (N, 3, S, S) to (N, P, D)."""
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        features: Tensor = self.backbone.forward_features(pixels)
        if features.ndim == 3:  # a transformer's tokens already
            return features
        if getattr(self.backbone, "output_fmt", "NCHW") == "NHWC":  # Swin and its like
            features = features.permute(0, 3, 1, 2)
        if self.pool is not None:
            features = F.adaptive_avg_pool2d(features, self.pool)
        return features.flatten(2).transpose(1, 2)


class OpenClipEncoder(ImageEncoder):
    """The vision tower of an open_clip model, cut before its last block (BLIP-2, section 3.1)."""

    def __init__(self, config: EncoderConfig) -> None:
        """Build the tower, with open_clip's weights where `config.pretrained` names some."""
        import open_clip

        super().__init__()
        tower = open_clip.create_model(config.name, pretrained=config.pretrained).visual
        self.tower: Any = _cut_last_block(tower, config.name)
        self.freeze()

    def forward(self, pixels: Tensor) -> Tensor:
        """Map (N, 3, S, S) to (N, P, D), the class token first."""
        if hasattr(self.tower, "trunk"):
            return cast(Tensor, self.tower.trunk.forward_features(pixels))
        out = self.tower.forward_intermediates(
            pixels,
            indices=1,  # the last of the blocks that are left
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        class_token, patches = out["image_intermediates_prefix"][0], out["image_intermediates"][0]
        return torch.cat((class_token, patches), dim=1)


def _cut_last_block(tower: Any, name: str) -> Any:
    """Drop what follows the second-last block, so that it is neither kept nor computed."""
    if hasattr(tower, "trunk") and hasattr(tower.trunk, "blocks"):  # EVA, through timm
        trunk = tower.trunk
        trunk.blocks = trunk.blocks[:-1]
        trunk.norm = nn.Identity()
        trunk.fc_norm = nn.Identity()
        trunk.head = nn.Identity()
        tower.head = nn.Identity()
    elif hasattr(tower, "transformer") and hasattr(tower.transformer, "resblocks"):
        tower.transformer.resblocks = tower.transformer.resblocks[:-1]
        tower.ln_post = nn.Identity()
        tower.proj = None
    else:
        raise CheckpointError(f"open_clip's {name} has no vision transformer to take tokens from")
    return tower


class Blip2VisionEncoder(ImageEncoder):
    """transformers' `Blip2VisionModel`, for checkpoints in the hub's format."""

    def __init__(self, config: EncoderConfig) -> None:
        """Build the vision transformer from the fields of a `Blip2VisionConfig`."""
        from transformers import Blip2VisionConfig, Blip2VisionModel

        super().__init__()
        vision_model: Any = Blip2VisionModel(Blip2VisionConfig(**config.vision_config))
        vision_model.post_layernorm = nn.Identity()  # ours is the model's ln_vision
        self.vision_model = vision_model
        self.freeze()

    def forward(self, pixels: Tensor) -> Tensor:
        """Map (N, 3, S, S) to (N, P, D), the class token first."""
        return cast(Tensor, self.vision_model(pixel_values=pixels).last_hidden_state)


_KINDS: dict[str, type[TimmEncoder] | type[OpenClipEncoder] | type[Blip2VisionEncoder]] = {
    "timm": TimmEncoder,
    "open_clip": OpenClipEncoder,
    "blip2_vision": Blip2VisionEncoder,
}


def build_encoder(config: EncoderConfig) -> ImageEncoder:
    """Build the encoder that the configuration names, frozen."""
    return _KINDS[config.kind](config)
