"""LAVIS `.pth` files, written here by hand from a tiny model in the hub's format, and compared with it."""

import os
import re

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from foreign import CAPTIONS, hub_model, randomise, save_hub, wordpiece

from blip2_search.retrieval import lavis
from blip2_search.retrieval.checkpoints import save_model
from blip2_search.retrieval.config import EncoderConfig
from blip2_search.retrieval.encoders import OpenClipEncoder
from blip2_search.retrieval.errors import CheckpointError
from blip2_search.retrieval.hub import load_hub
from blip2_search.retrieval.lavis import load_lavis
from blip2_search.retrieval.loading import load_model

# LAVIS fixes the size of heads (64) and the epsilons, so the other side has to follow.
VISION = {"hidden_size": 64, "num_attention_heads": 1, "layer_norm_eps": 1e-6}
QFORMER = {"hidden_size": 128, "num_attention_heads": 2, "layer_norm_eps": 1e-12}
WORDS = "Qformer.bert.embeddings.word_embeddings.weight"
LM = "Qformer.cls.predictions."


@pytest.fixture(scope="module")
def hub_pair(tmp_path_factory):
    """Return a tiny hub model that LAVIS could have made: no bias on the keys of its ViT."""
    model = hub_model(vision=VISION, qformer=QFORMER, image_text_hidden_size=24)
    with torch.no_grad():
        for layer in model.vision_model.encoder.layers:
            layer.self_attn.qkv.bias[64:128] = 0
    folder = save_hub(model, tmp_path_factory.mktemp("hub"))
    # LAVIS's processors know CLIP's mean and std only.
    (folder / "preprocessor_config.json").write_text('{"size": 28}')
    return model, load_hub(str(folder))


def to_lavis(model):
    """Rename a hub model's tensors backwards, by the replacements of the hub's conversion."""
    state = {}
    for name, tensor in model.state_dict().items():
        state[lavis_name(name)] = tensor.clone()
    for name in [n for n in state if n.endswith("attn.qkv.bias")]:
        query, key, value = state.pop(name).chunk(3)
        assert not key.any()
        state[name.replace("qkv.bias", "q_bias")] = query
        state[name.replace("qkv.bias", "v_bias")] = value
    return state


def lavis_name(name):
    if name.startswith("vision_model."):
        for theirs, ours in (
            ("vision_model.post_layernorm", "ln_vision"),
            ("vision_model.embeddings.class_embedding", "visual_encoder.cls_token"),
            ("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed"),
            ("vision_model.embeddings.patch_embedding", "visual_encoder.patch_embed.proj"),
            ("vision_model.encoder.layers", "visual_encoder.blocks"),
            ("layer_norm", "norm"),
            ("self_attn.projection", "attn.proj"),
            ("self_attn", "attn"),
        ):
            name = name.replace(theirs, ours)
        return name
    name = re.sub("^embeddings", "Qformer.bert.embeddings", name)
    name = re.sub("^qformer.layernorm", "Qformer.bert.embeddings.LayerNorm", name)
    name = re.sub("^qformer", "Qformer.bert", name)
    name = name.replace("attention.attention", "attention.self")
    return name.replace("_projection", "_proj")


def with_head(state):
    """Add what the hub's conversion drops: language-model head, temperature, position numbers."""
    generator = torch.Generator().manual_seed(5)
    words, bias = state[WORDS], torch.randn(len(state[WORDS]), generator=generator)
    return state | {
        "temp": torch.tensor(0.031),
        "Qformer.bert.embeddings.position_ids": torch.arange(40)[None],
        f"{LM}bias": bias,
        f"{LM}decoder.bias": bias.clone(),
        f"{LM}decoder.weight": words.clone(),
        f"{LM}transform.dense.weight": torch.randn(128, 128, generator=generator),
        f"{LM}transform.dense.bias": torch.randn(128, generator=generator),
        f"{LM}transform.LayerNorm.weight": torch.randn(128, generator=generator),
        f"{LM}transform.LayerNorm.bias": torch.randn(128, generator=generator),
    }


def write(folder, state):
    folder.mkdir(exist_ok=True)
    wordpiece().save(str(folder / "tokenizer.json"))
    torch.save({"model": state, "epoch": 3}, folder / "stage1.pth")
    return folder / "stage1.pth"


@pytest.fixture
def state(hub_pair):
    return with_head(to_lavis(hub_pair[0]))


@pytest.fixture
def pth(state, tmp_path):
    return write(tmp_path / "lavis", state)


def same_outputs(one, other, pictures, atol=1e-4):
    np.testing.assert_allclose(
        one.encode_images(pictures), other.encode_images(pictures), atol=atol
    )
    np.testing.assert_allclose(one.encode_texts(CAPTIONS), other.encode_texts(CAPTIONS), atol=atol)
    tokens = one.image_tokens(pictures), other.image_tokens(pictures)
    np.testing.assert_allclose(
        one.match(tokens[0], CAPTIONS), other.match(tokens[1], CAPTIONS), atol=10 * atol
    )


def test_equals_the_hub_format(hub_pair, pth, pictures):
    ours = load_model(pth, device="cpu")
    # LAVIS's final LayerNorm has torch's epsilon, the hub's that of the vision model.
    assert ours.ln_vision.eps == 1e-5
    assert hub_pair[1].ln_vision.eps == 1e-6
    ours.ln_vision.eps = 1e-6
    same_outputs(ours, hub_pair[1], pictures)


def test_sizes_follow_from_shapes(pth):
    config = load_lavis(pth).config
    assert config.name == "stage1"
    assert (config.qformer.num_layers, config.qformer.cross_attention_every) == (3, 2)
    assert (config.qformer.num_queries, config.qformer.hidden_size) == (8, 128)
    assert (config.qformer.num_heads, config.qformer.ffn_size) == (2, 56)
    assert (config.qformer.max_positions, config.embedding_size) == (40, 24)
    assert (config.preprocess.image_size, config.encoder.vision_config["patch_size"]) == (28, 14)


def test_image_size_follows_from_the_position_embedding(state, tmp_path):
    grid = torch.randn(1, 3 * 3 + 1, 64)
    path = write(tmp_path / "lavis", state | {"visual_encoder.pos_embed": grid})
    assert load_lavis(path).config.preprocess.image_size == 42


def test_language_model_head_and_temperature(state, pth):
    ours = load_lavis(pth)
    assert ours.temperature.item() == pytest.approx(0.031)
    hidden = torch.randn(2, 3, 128)
    dense = F.linear(
        hidden, state[f"{LM}transform.dense.weight"], state[f"{LM}transform.dense.bias"]
    )
    normed = F.layer_norm(
        F.gelu(dense),
        (128,),
        state[f"{LM}transform.LayerNorm.weight"],
        state[f"{LM}transform.LayerNorm.bias"],
        1e-12,
    )
    expected = F.linear(normed, state[WORDS], state[f"{LM}bias"])
    got = ours.lm_head(hidden, ours.qformer.word_embeddings.weight)
    torch.testing.assert_close(got, expected)


def test_bare_state_without_head_or_temperature(hub_pair, tmp_path, pictures):
    path = write(tmp_path / "lavis", {})
    torch.save(to_lavis(hub_pair[0]), path)
    ours = load_lavis(path)
    assert ours.lm_head is None
    ours.ln_vision.eps = 1e-6
    same_outputs(ours, hub_pair[1], pictures)


def test_the_real_sizes_of_heads():
    assert lavis._EVA_HEAD_SIZES[1408] * 16 == 1408
    assert lavis.FROZEN_ENCODERS[1408].name == "EVA01-g-14"
    for encoder in lavis.FROZEN_ENCODERS.values():
        config = open_clip.get_model_config(encoder.name)
        tag = open_clip.get_pretrained_cfg(encoder.name, encoder.pretrained)
        assert tag, "open_clip knows the weights"
        # Weights trained with one activation and run with another give silently worse features.
        assert bool(tag.get("quick_gelu")) == bool(config.get("quick_gelu"))


# ---- the image encoder was frozen, or is a CLIP tower --------------------------------------------


@pytest.fixture
def clip_weights(tiny_clip, tmp_path, monkeypatch):
    """Put a tiny CLIP, its weights in a file, in the place of the encoders that LAVIS freezes."""
    clip = open_clip.create_model("tiny-clip", pretrained=None)
    randomise(clip, seed=3)
    file = tmp_path / "clip.pt"
    torch.save(clip.state_dict(), file)
    config = EncoderConfig(kind="open_clip", name="tiny-clip", pretrained=str(file))
    monkeypatch.setattr(lavis, "FROZEN_ENCODERS", {64: config})
    return file


def without_encoder(state):
    return {k: v for k, v in state.items() if not k.startswith("visual_encoder.")}


def test_frozen_encoder_comes_from_open_clip(clip_weights, state, tmp_path, pictures, hub_pair):
    path = write(tmp_path / "lavis", without_encoder(state))
    ours = load_lavis(path)
    weights = torch.load(clip_weights)
    for name, tensor in ours.image_encoder.tower.state_dict().items():
        assert torch.equal(tensor, weights[f"visual.{name}"])
    np.testing.assert_allclose(
        ours.encode_texts(CAPTIONS), hub_pair[1].encode_texts(CAPTIONS), atol=1e-4
    )
    # From now on the model carries its encoder: saved, it needs no download.
    save_model(ours, tmp_path / "saved")
    os.unlink(clip_weights)
    again = load_model(tmp_path / "saved", device="cpu")
    assert again.fingerprint == ours.fingerprint
    same_outputs(again, ours, pictures)


def test_clip_tower_in_the_checkpoint(clip_weights, state, tmp_path, pictures):
    frozen = load_lavis(write(tmp_path / "frozen", without_encoder(state)))
    tower = {  # under CLIP's names, without the last block and what follows it
        name.replace("visual.", "visual_encoder."): tensor
        for name, tensor in torch.load(clip_weights).items()
        if name.startswith("visual.")
        and not name.startswith(
            ("visual.transformer.resblocks.2.", "visual.ln_post", "visual.proj")
        )
    }
    os.unlink(clip_weights)
    trained = load_lavis(write(tmp_path / "trained", without_encoder(state) | tower))
    assert trained.fingerprint == frozen.fingerprint
    same_outputs(trained, frozen, pictures)

    key = "visual_encoder.transformer.resblocks.1.mlp.c_fc.bias"
    del tower[key]
    with pytest.raises(CheckpointError, match=f"lacks {key}$"):
        load_lavis(write(tmp_path / "trained", without_encoder(state) | tower))


def test_everything_but_a_frozen_encoder_is_required(clip_weights, state, tmp_path):
    state = without_encoder(state)
    del state["itm_head.bias"]
    with pytest.raises(CheckpointError, match=r"lacks itm_head\.bias$"):
        load_lavis(write(tmp_path / "lavis", state))


def test_download_fails(clip_weights, state, tmp_path):
    os.unlink(clip_weights)
    with pytest.raises(CheckpointError, match=r"without its frozen.*tiny-clip.*cannot be had") as e:
        load_lavis(write(tmp_path / "lavis", without_encoder(state)))
    assert "\n" not in str(e.value)


def test_unknown_frozen_encoder(state, tmp_path):
    with pytest.raises(CheckpointError, match="no image encoder is known with tokens of size 64"):
        load_lavis(write(tmp_path / "lavis", without_encoder(state)))


def test_open_clip_tower_is_cut_the_same_way(clip_weights):
    encoder = OpenClipEncoder(lavis.FROZEN_ENCODERS[64])
    assert not any("resblocks.2" in name for name in encoder.state_dict())


# ---- strictness ------------------------------------------------------------------------------------

KEYS = [
    "visual_encoder.blocks.1.attn.qkv.weight",
    "visual_encoder.cls_token",
    "ln_vision.bias",
    "Qformer.bert.encoder.layer.2.crossattention.self.value.bias",
    "Qformer.bert.encoder.layer.0.output_query.dense.weight",
    f"{LM}transform.LayerNorm.bias",
    "text_proj.weight",
]


@pytest.mark.parametrize("key", KEYS)
def test_missing_key_is_named(state, tmp_path, key):
    del state[key]
    with pytest.raises(CheckpointError, match=f"lacks {key}$"):
        load_lavis(write(tmp_path / "lavis", state))


@pytest.mark.parametrize(
    "key", ["visual_encoder.norm.weight", "itm_head.scale", "vision_queue", f"{LM}more.weight"]
)
def test_unexpected_key_is_named(state, tmp_path, key):
    state[key] = torch.zeros(2)
    with pytest.raises(CheckpointError, match=f"has unexpected {key}$"):
        load_lavis(write(tmp_path / "lavis", state))


@pytest.mark.parametrize("key", KEYS)
def test_wrong_shape_is_named(state, tmp_path, key):
    state[key] = torch.cat((state[key], state[key]), dim=-1)
    with pytest.raises(CheckpointError, match=f"shapes {key} is "):
        load_lavis(write(tmp_path / "lavis", state))


def test_lone_query_bias_is_named(state, tmp_path):
    del state["visual_encoder.blocks.0.attn.v_bias"]
    with pytest.raises(CheckpointError, match=r"lacks visual_encoder.blocks.0.attn.qkv.bias$"):
        load_lavis(write(tmp_path / "lavis", state))


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_decoder_must_be_tied(state, tmp_path, name):
    state[f"{LM}decoder.{name}"][0] += 1
    with pytest.raises(CheckpointError, match=f"decoder.{name} and .* are not the same"):
        load_lavis(write(tmp_path / "lavis", state))


def test_irregular_cross_attention(state, tmp_path):
    for key in [key for key in state if ".layer.0.crossattention." in key]:
        del state[key]
    with pytest.raises(CheckpointError, match=r"cross-attention in layers \[2\]"):
        load_lavis(write(tmp_path / "lavis", state))


def test_position_embedding_of_no_square(state, tmp_path):
    state["visual_encoder.pos_embed"] = torch.zeros(1, 7, 64)
    with pytest.raises(CheckpointError, match="6 patches make no square"):
        load_lavis(write(tmp_path / "lavis", state))


def test_stage_2_and_other_files_are_told_apart(state, tmp_path):
    with pytest.raises(CheckpointError, match="stage 2"):
        load_lavis(write(tmp_path / "lavis", state | {"opt_proj.weight": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match="no LAVIS stage-1 checkpoint: it lacks ln_vision"):
        load_lavis(write(tmp_path / "lavis", {"fc.weight": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match="'epoch' is a int, not a tensor"):
        load_lavis(write(tmp_path / "lavis", state | {"epoch": 3}))


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_a_pickle_with_code_is_refused(tmp_path):
    path = tmp_path / "evil.pth"
    torch.save({"model": {"temp": Malicious(tmp_path / "hacked")}}, path)
    with pytest.raises(CheckpointError, match="could run code"):
        load_model(path, device="cpu")
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize("data", [b"", b"no pickle at all", b"PK\x03\x04 no zip"])
def test_broken_files(tmp_path, data):
    path = tmp_path / "broken.pth"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"broken.pth.*broken") as caught:
        load_lavis(path)
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match="No such file"):
        load_model(tmp_path / "nothing.pth", device="cpu")


# ---- tokenizer -------------------------------------------------------------------------------------


def test_tokenizer_of_the_embedded_model(pth, tmp_path, monkeypatch):
    monkeypatch.setattr(lavis, "EMBEDDED", tmp_path / "models")
    (tmp_path / "models" / "mini").mkdir(parents=True)
    with_own = load_lavis(pth)
    (pth.parent / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="put its tokenizer"):
        load_lavis(pth)
    wordpiece().save(str(tmp_path / "models" / "mini" / "tokenizer.json"))
    ours = load_lavis(pth)
    assert torch.equal(ours.tokenize(CAPTIONS).token_ids, with_own.tokenize(CAPTIONS).token_ids)


def test_tokenizer_of_another_vocabulary(pth):
    tokenizer = wordpiece()
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save(str(pth.parent / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=r"has 17 word embeddings.*has 18 tokens"):
        load_lavis(pth)
