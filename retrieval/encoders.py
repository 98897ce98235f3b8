"""Image encoders behind one small interface: pixels in, image tokens out.

A frozen encoder (the default, as in BLIP-2's stage 1) gets no gradient.
None applies a final LayerNorm: BLIP-2 trains its own, `ln_vision`, which belongs to the model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import EncoderConfig
from .errors import CheckpointError

_BLOCK = re.compile(r"\b(?:stages|blocks|resblocks|layers)\.(\d+)\.")  # the outermost counts
_BELOW_THE_BLOCKS = re.compile(r"embed|cls_token|conv_stem|\bbn1\b|\bconv1\b|ln_pre")


def layers_above(names: Sequence[str]) -> dict[str, int]:
    """Return how many layers lie above each parameter of an encoder, for layer-wise decay.

    Counted as the reference implementation does: 1 for the last block and for what follows it.

    >>> layers_above(["patch_embed.proj.weight", "blocks.0.mlp.weight", "blocks.1.mlp.weight", "norm.weight"])
    {'patch_embed.proj.weight': 3, 'blocks.0.mlp.weight': 2, 'blocks.1.mlp.weight': 1, 'norm.weight': 1}
    """
    blocks = {name: int(found[1]) + 1 for name in names if (found := _BLOCK.search(name))}
    top = max(blocks.values(), default=0)

    def layer(name: str) -> int:
        return blocks.get(name, 0 if _BELOW_THE_BLOCKS.search(name) else top)

    return {name: top + 1 - layer(name) for name in names}


class ImageEncoder(nn.Module):
    """The interface: `forward(pixels (N, 3, S, S)) -> image tokens (N, P, D)`."""

    frozen = True
    takes_any_size = False  # and gives as many tokens for each

    def freeze(self, frozen: bool = True) -> None:
        """Switch gradients and training behaviour off (or on again)."""
        self.frozen = frozen
        self.requires_grad_(not frozen)
        self.train(not frozen)

    def train(self, mode: bool = True) -> ImageEncoder:
        """Enter training mode, unless frozen: then stay in evaluation mode, as batch norms always do.

        The statistics of a pretrained network serve fine-tuning better than those of a small batch.
        """
        super().train(mode and not self.frozen)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def checkpoint_gradients(self) -> None:
        """Recompute the blocks in the backward pass: less memory, a third more time."""
        raise NotImplementedError

    def resize(self, image_size: int) -> None:
        """Take images of another size: position embeddings are interpolated (bicubic)."""
        raise NotImplementedError


class TimmEncoder(ImageEncoder):
    """A timm backbone: the last grid of a convolutional network, or a transformer's tokens."""

    def __init__(self, config: EncoderConfig, image_size: int | None = None) -> None:
        """Build the backbone without weights; `config.pool` averages the grid down."""
        import timm

        super().__init__()
        self.backbone: Any = timm.create_model(
            config.name, pretrained=False, num_classes=0, global_pool=""
        )
        self.backbone.to(memory_format=torch.channels_last)  # 1.5 times faster on CPUs
        self.pool = config.pool
        self.takes_any_size = self.pool is not None and not hasattr(self.backbone, "set_input_size")
        if image_size is not None:
            self.resize(image_size)
        self.freeze()

    def checkpoint_gradients(self) -> None:
        """Recompute the blocks in the backward pass."""
        self.backbone.set_grad_checkpointing(True)

    def resize(self, image_size: int) -> None:
        """Take images of another size."""
        if hasattr(self.backbone, "set_input_size"):
            self.backbone.set_input_size(img_size=image_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map (N, 3, S, S) to (N, P, D)."""
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        return self._tokens(self.backbone.forward_features(pixels))

    @property
    def frozen_blocks(self) -> int:
        """How many of the lowest blocks no gradient reaches; 0 for networks that have no `lower`."""
        from timm.models import EfficientNet

        if not isinstance(self.backbone, EfficientNet):
            return 0
        blocks = [self.backbone.conv_stem, self.backbone.bn1, *self.backbone.blocks]
        trained = [any(p.requires_grad for p in block.parameters()) for block in blocks]
        return max(0, [*trained, True].index(True) - 2)

    def lower(self, pixels: Tensor, blocks: int) -> Tensor:
        """Map pixels to what the stem and the lowest blocks of an EfficientNet make of them."""
        features: Tensor = self.backbone.bn1(self.backbone.conv_stem(pixels))
        for block in self.backbone.blocks[:blocks]:
            features = block(features)
        return features

    def upper(self, features: Tensor, blocks: int) -> Tensor:
        """Map what `lower` made to (N, P, D): `forward` is one after the other."""
        features = features.contiguous(memory_format=torch.channels_last)
        for block in self.backbone.blocks[blocks:]:
            features = block(features)
        return self._tokens(self.backbone.bn2(self.backbone.conv_head(features)))

    def _tokens(self, features: Tensor) -> Tensor:
        if features.ndim == 3:  # a transformer's tokens already
            return features
        if getattr(self.backbone, "output_fmt", "NCHW") == "NHWC":  # Swin and its like
            features = features.permute(0, 3, 1, 2)
        if self.pool is not None:
            features = F.adaptive_avg_pool2d(features, self.pool)
        return features.flatten(2).transpose(1, 2)


class OpenClipEncoder(ImageEncoder):
    """The vision tower of an open_clip model, cut before its last block (BLIP-2, section 3.1)."""

    def __init__(self, config: EncoderConfig, image_size: int | None = None) -> None:
        """Build the tower, with open_clip's weights where `config.pretrained` names some."""
        import open_clip

        super().__init__()
        tower = open_clip.create_model(config.name, pretrained=config.pretrained).visual
        self.tower: Any = _cut_last_block(tower, config.name)
        if image_size is not None:
            self.resize(image_size)
        self.freeze()

    def checkpoint_gradients(self) -> None:
        """Recompute the blocks in the backward pass."""
        self.tower.set_grad_checkpointing(True)

    def resize(self, image_size: int) -> None:
        """Take images of another size."""
        if hasattr(self.tower, "trunk"):
            if tuple(self.tower.trunk.patch_embed.img_size) != (image_size, image_size):
                self.tower.trunk.set_input_size(img_size=image_size)
            return
        side = image_size // self.tower.patch_size[0]
        if (side, side) == tuple(self.tower.grid_size):
            return
        positions = self.tower.positional_embedding
        self.tower.positional_embedding = nn.Parameter(_interpolated(positions[None], side)[0])
        self.tower.grid_size = (side, side)
        self.tower.image_size = (image_size, image_size)

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

    def __init__(self, config: EncoderConfig, image_size: int | None = None) -> None:
        """Build the vision transformer from the fields of a `Blip2VisionConfig`."""
        from transformers import Blip2VisionConfig, Blip2VisionModel

        super().__init__()
        vision_model: Any = Blip2VisionModel(Blip2VisionConfig(**config.vision_config))
        vision_model.post_layernorm = nn.Identity()  # ours is the model's ln_vision
        self.vision_model = vision_model
        self.freeze()

    def checkpoint_gradients(self) -> None:
        """Recompute the blocks in the backward pass."""
        model = self.vision_model  # transformers 5 renames the method
        enable = getattr(model, "activation_checkpointing_enable", None)
        # Re-entrant checkpoints would drop the gradient where the lowest layers are frozen.
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})

    def resize(self, image_size: int) -> None:
        """Take images of another size."""
        embeddings = self.vision_model.embeddings
        side = image_size // embeddings.patch_size
        positions = _interpolated(embeddings.position_embedding, side)
        embeddings.position_embedding = nn.Parameter(positions)
        embeddings.image_size = image_size
        embeddings.num_patches, embeddings.num_positions = side**2, side**2 + 1
        self.vision_model.config.image_size = image_size

    def forward(self, pixels: Tensor) -> Tensor:
        """Map (N, 3, S, S) to (N, P, D), the class token first."""
        return cast(Tensor, self.vision_model(pixel_values=pixels).last_hidden_state)


def _interpolated(positions: Tensor, side: int) -> Tensor:
    """Interpolate (1, 1 + P, D), the class token's first, to a square grid of `side`."""
    from timm.layers.pos_embed import resample_abs_pos_embed

    resampled: Tensor = resample_abs_pos_embed(
        positions.detach(), [side, side], num_prefix_tokens=1
    )
    return resampled


_KINDS: dict[str, type[TimmEncoder] | type[OpenClipEncoder] | type[Blip2VisionEncoder]] = {
    "timm": TimmEncoder,
    "open_clip": OpenClipEncoder,
    "blip2_vision": Blip2VisionEncoder,
}


def build_encoder(config: EncoderConfig, image_size: int | None = None) -> ImageEncoder:
    """Build the encoder that the configuration names, frozen.

    Args:
        config: which.
        image_size: pixels a side, where they are not those that the encoder was made for.
    """
    return _KINDS[config.kind](config, image_size)
