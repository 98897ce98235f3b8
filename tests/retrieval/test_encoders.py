"""The image encoders: shapes, the cut before the last block, and freezing."""

import open_clip
import pytest
import timm
import torch
from foreign import hub_model, randomise

from blip2_search.retrieval.config import EncoderConfig
from blip2_search.retrieval.encoders import build_encoder, layers_above
from blip2_search.retrieval.errors import CheckpointError

PIXELS = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
@torch.no_grad()
def test_timm_grid(name):
    pixels = torch.randn(2, 3, 96, 64)
    encoder = build_encoder(EncoderConfig(kind="timm", name=name))
    grid = encoder.backbone.forward_features(pixels)  # (N, D, rows, columns)
    tokens = encoder(pixels)
    assert tokens.shape == (2, grid.shape[2] * grid.shape[3], grid.shape[1])
    columns = grid.shape[3]
    torch.testing.assert_close(tokens[1, columns + 1], grid[1, :, 1, 1])


@torch.no_grad()
def test_timm_pooled_grid():
    pixels = torch.randn(2, 3, 128, 128)
    encoder = build_encoder(EncoderConfig(kind="timm", name="test_efficientnet", pool=2))
    grid = encoder.backbone.forward_features(pixels)  # 4 x 4
    tokens = encoder(pixels)
    assert tokens.shape == (2, 4, grid.shape[1])
    torch.testing.assert_close(tokens[:, 1], grid[:, :, :2, 2:].mean(dim=(2, 3)))


@torch.no_grad()
def test_timm_grid_with_channels_last():
    pixels = torch.randn(2, 3, 128, 128)
    encoder = build_encoder(EncoderConfig(kind="timm", name="test_mambaout"))
    grid = encoder.backbone.forward_features(pixels)  # (N, rows, columns, D)
    torch.testing.assert_close(encoder(pixels), grid.flatten(1, 2))


@torch.no_grad()
def test_timm_transformer_tokens():
    encoder = build_encoder(EncoderConfig(kind="timm", name="test_vit"))
    pixels = torch.randn(2, 3, 160, 160)
    assert torch.equal(encoder(pixels), encoder.backbone.forward_features(pixels))


def second_last(blocks, run):
    """Run an uncut tower and return what its second-last block gives."""
    caught = []
    handle = blocks[-2].register_forward_hook(lambda module, inputs, output: caught.append(output))
    run()
    handle.remove()
    return caught[0]


@pytest.mark.parametrize("name", ["tiny-clip", "tiny-eva"])
@torch.no_grad()
def test_open_clip_gives_the_second_last_block(tiny_clip, tmp_path, name):
    clip = open_clip.create_model(name, pretrained=None).eval()
    randomise(clip.visual)
    torch.save(clip.state_dict(), tmp_path / "weights.pt")
    tower = clip.visual
    eva = name == "tiny-eva"
    blocks = tower.trunk.blocks if eva else tower.transformer.resblocks
    side = 224 if eva else 28
    pixels = torch.randn(2, 3, side, side)
    expected = second_last(blocks, lambda: tower(pixels))

    config = EncoderConfig(kind="open_clip", name=name, pretrained=str(tmp_path / "weights.pt"))
    encoder = build_encoder(config)
    tokens = encoder(pixels)
    patches = (side // 14) ** 2
    assert tokens.shape == (2, patches + 1, expected.shape[-1])  # the class token first
    assert expected.std() > 0.1
    torch.testing.assert_close(tokens, expected, atol=1e-4, rtol=1e-4)
    # The last block and what follows it are gone, not only skipped.
    dropped = set(clip.visual.state_dict()) - {
        key.removeprefix("tower.") for key in encoder.state_dict()
    }
    kept_blocks = len(blocks) - 1
    assert any(f"blocks.{kept_blocks}." in key for key in dropped)
    assert not any(f"blocks.{kept_blocks - 1}." in key for key in dropped)


def test_open_clip_without_a_transformer():
    with pytest.raises(CheckpointError, match="RN50 has no vision transformer"):
        build_encoder(EncoderConfig(kind="open_clip", name="RN50"))


@torch.no_grad()
def test_blip2_vision_is_the_model_without_its_last_norm():
    theirs = hub_model().vision_model
    config = theirs.config
    names = (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
        "image_size", "patch_size", "layer_norm_eps",
    )  # fmt: skip
    encoder = build_encoder(
        EncoderConfig(
            kind="blip2_vision", vision_config={name: getattr(config, name) for name in names}
        )
    )
    missing, unexpected = encoder.vision_model.load_state_dict(theirs.state_dict(), strict=False)
    assert missing == []
    assert unexpected == ["post_layernorm.weight", "post_layernorm.bias"]
    expected = theirs(pixel_values=PIXELS).last_hidden_state
    torch.testing.assert_close(theirs.post_layernorm(encoder(PIXELS)), expected)


CONFIGS = [
    EncoderConfig(kind="timm", name="test_efficientnet"),
    EncoderConfig(kind="open_clip", name="tiny-clip"),
    EncoderConfig(
        kind="blip2_vision",
        vision_config={
            "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1,
            "intermediate_size": 16, "image_size": 28, "patch_size": 14,
        },
    ),
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
def test_frozen_unless_told_otherwise(tiny_clip, config):
    encoder = build_encoder(config)
    parent = torch.nn.Sequential(encoder)
    parent.train()
    assert parent.training
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    buffers = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
    assert not encoder(PIXELS).requires_grad
    for name, buffer in encoder.named_buffers():  # running statistics stand still
        assert torch.equal(buffer, buffers[name])

    encoder.freeze(False)
    assert encoder.training
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    encoder(PIXELS).sum().backward()
    parent.eval()
    assert not encoder.training
    parent.train()
    assert encoder.training

    encoder.freeze()
    assert not encoder.training


def test_the_model_keeps_its_encoder_frozen(tiny_model):
    tiny_model.train()
    assert tiny_model.qformer.training
    assert not any(module.training for module in tiny_model.image_encoder.modules())
    tiny_model.eval()


def test_weights_are_never_fetched_unasked(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a download")

    monkeypatch.setattr(timm.models._builder, "load_pretrained", refuse)
    build_encoder(EncoderConfig(kind="timm", name="test_resnet"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
def test_a_trained_encoder_keeps_its_statistics(tiny_clip, config):
    encoder = build_encoder(config)
    encoder.freeze(False)
    encoder.train()
    buffers = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
    plain = encoder(PIXELS)
    plain.sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())
    assert all(torch.equal(buffers[name], buffer) for name, buffer in encoder.named_buffers())
    gradients = [p.grad.clone() for p in encoder.parameters()]
    encoder.zero_grad()
    encoder.checkpoint_gradients()
    again = encoder(PIXELS)
    again.sum().backward()
    torch.testing.assert_close(again, plain)
    for parameter, gradient in zip(encoder.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("name", ["tiny-clip", "tiny-eva"])
@torch.no_grad()
def test_open_clip_at_another_size(tiny_clip, name):
    side = 280 if name == "tiny-eva" else 56
    encoder = build_encoder(EncoderConfig(kind="open_clip", name=name), image_size=side)
    tokens = encoder(torch.randn(2, 3, side, side))
    assert tokens.shape[1] == (side // 14) ** 2 + 1


@torch.no_grad()
def test_blip2_vision_at_another_size():
    encoder = build_encoder(CONFIGS[2])
    torch.nn.init.normal_(encoder.vision_model.embeddings.position_embedding)
    before = encoder.vision_model.embeddings.position_embedding.clone()
    encoder.resize(28)
    assert torch.equal(encoder.vision_model.embeddings.position_embedding, before)
    encoder.resize(56)
    positions = encoder.vision_model.embeddings.position_embedding
    assert positions.shape == (1, 17, 16)
    assert torch.equal(positions[:, 0], before[:, 0])  # the class token's
    assert encoder(torch.randn(2, 3, 56, 56)).shape == (2, 17, 16)
    # Rebuilt from a configuration of the new size, the tensors fit.
    fields = {**CONFIGS[2].vision_config, "image_size": 56}
    rebuilt = build_encoder(EncoderConfig(kind="blip2_vision", vision_config=fields))
    rebuilt.load_state_dict(encoder.state_dict())


def test_layers_above_counts_from_the_top():
    encoder = build_encoder(EncoderConfig(kind="timm", name="tf_efficientnet_lite0"))
    above = layers_above([name for name, _ in encoder.named_parameters()])
    assert above["backbone.conv_stem.weight"] == above["backbone.bn1.weight"] == 8
    assert above["backbone.blocks.0.0.bn1.weight"] == 7
    assert above["backbone.blocks.6.0.bn1.weight"] == 1
    assert above["backbone.conv_head.weight"] == above["backbone.bn2.weight"] == 1
