"""Our model against transformers' `Blip2ForImageTextRetrieval`, with the same random weights."""

import json

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from foreign import CAPTIONS, PILLOW_PROCESSOR, VOCABULARY, edit_json, hub_model, save_hub
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from blip2_search.retrieval.errors import CheckpointError
from blip2_search.retrieval.hub import load_hub
from blip2_search.retrieval.loading import load_model
from blip2_search.retrieval.model import max_over_queries

CLOSE = {"atol": 1e-4, "rtol": 0}
NUM_QUERIES = 8


def their_inputs(folder, images, captions, expand):
    """Prepare inputs the way transformers documents it.

    With `config.image_token_index` set, it drops the first Q ids: they must be put there first.
    """
    pixels = PILLOW_PROCESSOR.from_pretrained(folder)(images, return_tensors="pt")["pixel_values"]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), pad_token="[PAD]"
    )
    text = tokenizer(captions, padding=True, return_tensors="pt")
    ids, mask = text["input_ids"], text["attention_mask"]
    if expand:
        image_token = torch.full((len(ids), NUM_QUERIES), len(VOCABULARY))
        ids = torch.cat((image_token, ids), dim=1)
        mask = torch.cat((torch.ones_like(image_token), mask), dim=1)
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask}


@pytest.fixture(params=[None, len(VOCABULARY)], ids=["plain", "image_token_index"])
def pair(request, tmp_path):
    """Return transformers' model, ours, the folder, and whether texts must be expanded."""
    model = hub_model(image_token_index=request.param)
    folder = save_hub(model, tmp_path / "hub")
    return model, load_hub(str(folder)), folder, request.param is not None


@pytest.mark.parametrize("count", [1, 4])
@torch.no_grad()
def test_itc_and_itm_equal_transformers(pair, pictures, count):
    model, ours, folder, expand = pair
    images, captions = pictures[:count], CAPTIONS[:count]
    inputs = their_inputs(folder, images, captions, expand)
    padded = bool((inputs["attention_mask"] == 0).any())
    assert padded == (count > 1)
    contrast = model(**inputs)

    features, texts = ours.encode_images(images), ours.encode_texts(captions)
    assert features.shape == (count, NUM_QUERIES, 16)
    assert features.dtype == texts.dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(features), contrast.image_embeds, **CLOSE)
    torch.testing.assert_close(torch.from_numpy(texts), contrast.text_embeds, **CLOSE)
    similarities = max_over_queries(torch.from_numpy(features), torch.from_numpy(texts))
    torch.testing.assert_close(similarities, contrast.logits_per_image, **CLOSE)

    match = model(**inputs, use_image_text_matching_head=True).logits_per_image
    tokens = ours.image_tokens(images)
    logits = ours.match_logits(ours.normalise_tokens(tokens), ours.tokenize(captions))
    torch.testing.assert_close(logits, match, **CLOSE)
    scores = torch.from_numpy(ours.match(tokens, captions))
    torch.testing.assert_close(scores, match[:, 1], **CLOSE)
    # The weights are wild enough for the comparison to mean something.
    if count > 1:
        assert contrast.logits_per_image.std() > 0.01
        assert match.std() > 0.1


@torch.no_grad()
def test_batches_and_padding_do_not_matter(hub_folder, pictures):
    ours = load_hub(str(hub_folder))
    tokens = ours.image_tokens(pictures, batch_size=3)
    whole = ours.match(tokens, CAPTIONS)
    for i, caption in enumerate(CAPTIONS):
        alone = ours.match(tokens[i : i + 1], [caption])
        np.testing.assert_allclose(alone, whole[i : i + 1], atol=1e-4)
        np.testing.assert_allclose(
            ours.encode_texts([caption])[0], ours.encode_texts(CAPTIONS)[i], atol=1e-5
        )
    np.testing.assert_allclose(
        ours.encode_images(pictures, batch_size=1), ours.encode_images(pictures), atol=1e-5
    )


def test_pixels_equal_the_image_processor(hub_folder, pictures):
    ours = load_hub(str(hub_folder)).image_transform
    theirs = PILLOW_PROCESSOR.from_pretrained(hub_folder)
    for picture in pictures:
        expected = theirs(picture, return_tensors="pt")["pixel_values"][0]
        np.testing.assert_allclose(ours(picture), expected, atol=1e-5)


def test_pixels_are_close_to_the_torchvision_processor(hub_folder, pictures):
    # Since version 5 transformers resizes with torchvision, whose bicubic filter rounds in another
    # place than Pillow's (with which BLIP-2 was evaluated). That moves a value by one step of 1/255,
    # by two in rare spots of high contrast; afterwards both are divided by the std.
    ours = load_hub(str(hub_folder)).image_transform
    theirs = transformers.BlipImageProcessor.from_pretrained(hub_folder)
    step = 1.01 / 255 / 0.2
    for picture in pictures:
        expected = theirs(picture, return_tensors="pt")["pixel_values"][0]
        difference = np.abs(ours(picture) - expected.numpy())
        assert difference.max() <= 2 * step
        assert (difference > step).mean() < 0.005


# ---- configurations as different versions of transformers write them -------------------------------


def test_configuration(hub_folder):
    config = load_hub(str(hub_folder)).config
    assert config.name == str(hub_folder)
    assert config.qformer.cross_attention_every == 2
    assert config.qformer.norm_eps == 0.1
    assert config.ln_vision_eps == 0.5
    assert config.preprocess.image_size == 28
    assert config.preprocess.mean == (0.5, 0.4, 0.3)
    assert config.lm_head is False


def test_image_processor_inside_the_processor_file(hub_folder):
    file = hub_folder / "preprocessor_config.json"
    nested = {"image_processor": json.loads(file.read_text()), "num_query_tokens": 8}
    (hub_folder / "processor_config.json").write_text(json.dumps(nested))
    file.unlink()
    assert load_hub(str(hub_folder)).config.preprocess.std == (0.3, 0.2, 0.25)


def test_fields_of_other_versions_are_no_obstacle(theirs, hub_folder):
    file = hub_folder / "config.json"
    config = json.loads(file.read_text())
    config["vision_config"] |= {"num_channels": 3, "projection_dim": 512, "dropout": 0.0}
    config["qformer_config"] |= {"position_embedding_type": "absolute", "classifier_dropout": None}
    del config["vision_config"]["patch_size"]  # 14 is the default
    config.pop("num_query_tokens", None)
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"query_tokens is \(8, 32\), not \(32, 32\)"):
        load_hub(str(hub_folder))
    edit_json(file, num_query_tokens=8)
    assert load_hub(str(hub_folder)).config.encoder.vision_config["patch_size"] == 14


def test_position_ids_of_old_versions_are_ignored(hub_folder):
    change_tensors(hub_folder, {"embeddings.position_ids": torch.arange(40)[None]})
    load_hub(str(hub_folder))


def test_shards(theirs, hub_folder):
    whole = load_hub(str(hub_folder))
    (hub_folder / "model.safetensors").unlink()
    theirs.save_pretrained(hub_folder, max_shard_size="40KB")
    assert len(list(hub_folder.glob("model-*.safetensors"))) > 2
    assert load_hub(str(hub_folder)).fingerprint == whole.fingerprint


def test_missing_shard(theirs, hub_folder):
    (hub_folder / "model.safetensors").unlink()
    theirs.save_pretrained(hub_folder, max_shard_size="40KB")
    shard = min(hub_folder.glob("model-*.safetensors"))
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        load_hub(str(hub_folder))


def test_legacy_bin(theirs, hub_folder):
    whole = load_hub(str(hub_folder))
    (hub_folder / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), hub_folder / "pytorch_model.bin")
    assert load_hub(str(hub_folder)).fingerprint == whole.fingerprint


def test_vocabulary_file_alone(hub_folder):
    whole = load_hub(str(hub_folder))
    (hub_folder / "tokenizer.json").unlink()
    (hub_folder / "vocab.txt").write_text("\n".join(VOCABULARY[:-1]) + "\n")
    added = {"<image>": len(VOCABULARY), "[DEC]": len(VOCABULARY) - 1}
    (hub_folder / "added_tokens.json").write_text(json.dumps(added))
    ours = load_hub(str(hub_folder))
    texts = [*CAPTIONS, "Two Cats, an unknown <image>"]
    assert torch.equal(ours.tokenize(texts).token_ids, whole.tokenize(texts).token_ids)
    assert ours.text_transform.tokenizer.token_to_id("[DEC]") == len(VOCABULARY) - 1


def test_image_placeholder_of_the_processor_is_text_like_any_other(hub_folder):
    plain = load_hub(str(hub_folder))
    file = hub_folder / "tokenizer.json"
    added = {
        "id": len(VOCABULARY), "content": "<image>", "single_word": False, "lstrip": False,
        "rstrip": False, "normalized": False, "special": True,
    }  # fmt: skip
    edit_json(file, added_tokens=[added])
    ours = load_hub(str(hub_folder))
    np.testing.assert_array_equal(
        ours.encode_texts(["a <image>"]), plain.encode_texts(["a <image>"])
    )


def test_load_model_knows_the_format(hub_folder):
    model = load_model(hub_folder, device="cpu")
    assert model.config.encoder.kind == "blip2_vision"
    assert not model.training


# ---- strictness ------------------------------------------------------------------------------------


def change_tensors(folder, added=None, removed=()):
    file = folder / "model.safetensors"
    tensors = load_file(file) | (added or {})
    save_file({k: v for k, v in tensors.items() if k not in removed}, file)


KEYS = [
    "query_tokens",
    "vision_model.post_layernorm.bias",
    "vision_model.encoder.layers.1.self_attn.qkv.bias",
    "embeddings.word_embeddings.weight",
    "qformer.encoder.layer.2.crossattention.attention.key.weight",
    "qformer.encoder.layer.1.output_query.LayerNorm.weight",
    "text_projection.weight",
]


@pytest.mark.parametrize("key", KEYS)
def test_missing_key_is_named(hub_folder, key):
    change_tensors(hub_folder, removed=[key])
    with pytest.raises(CheckpointError, match=f"lacks {key}$"):
        load_hub(str(hub_folder))


@pytest.mark.parametrize(
    "key",
    [
        "qformer.encoder.layer.1.crossattention.attention.key.weight",  # no cross-attention here
        "qformer.encoder.layer.3.attention.attention.key.weight",
        "ln_vision.weight",  # a name of ours is none of theirs
        "qformer.query_tokens",
        "language_projection.weight",
    ],
)
def test_unexpected_key_is_named(hub_folder, key):
    change_tensors(hub_folder, {key: torch.zeros(8, 32)})
    with pytest.raises(CheckpointError, match=f"has unexpected {key}$"):
        load_hub(str(hub_folder))


@pytest.mark.parametrize("key", KEYS)
def test_wrong_shape_is_named(hub_folder, key):
    tensor = load_file(hub_folder / "model.safetensors")[key]
    change_tensors(hub_folder, {key: torch.cat((tensor, tensor), dim=-1)})
    with pytest.raises(CheckpointError, match=f"shapes {key} is "):
        load_hub(str(hub_folder))


def test_every_tensor_matters(hub_folder, pictures):
    """Change each tensor in turn: features or match logits must change."""

    @torch.no_grad()
    def results(model):
        tokens = model.image_tokens(pictures[:2])
        parts = [model.encode_images(pictures[:2]), model.encode_texts(CAPTIONS[:2])]
        return np.concatenate([*(p.ravel() for p in parts), model.match(tokens, CAPTIONS[:2])])

    model = load_hub(str(hub_folder))
    before = results(model)
    silent = set()
    for name, tensor in model.state_dict().items():
        kept = tensor.clone()
        tensor += torch.linspace(-1, 1, tensor.numel()).view_as(tensor)
        if np.abs(results(model) - before).max() < 1e-6:
            silent.add(name)
        tensor.copy_(kept)
    # A bias on keys shifts all attention scores of a query alike, and softmax takes no notice.
    assert {name for name in silent if not name.endswith("attention.key.bias")} == {"temperature"}


def spoil_vision(folder):
    edit_json(folder / "config.json", vision_config={"hidden_size": "many"})


def spoil_image_size(folder):
    edit_json(folder / "preprocessor_config.json", size={"height": 384, "width": 384})


def spoil_filter(folder):
    edit_json(folder / "preprocessor_config.json", resample=2)


def spoil_qformer(**changes):
    def spoil(folder):
        file = folder / "config.json"
        config = json.loads(file.read_text())
        edit_json(file, qformer_config=config["qformer_config"] | changes)

    return spoil


def forget(name):
    return lambda folder: (folder / name).unlink()


def break_file(name):
    return lambda folder: (folder / name).write_bytes(b"\x80 no such format")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_vision, "vision_config is not valid.*many"),
        (spoil_image_size, "makes 384 pixels, the vision model takes 28"),
        (spoil_filter, "only bicubic"),
        (spoil_qformer(encoder_hidden_size=1408), "tokens of size 1408.*gives 48"),
        (spoil_qformer(use_qformer_text_input=False), "no text half"),
        (spoil_qformer(hidden_act="relu"), "relu"),
        (spoil_qformer(num_attention_heads=5), "32 is not a multiple of num_heads 5"),
        (spoil_qformer(vocab_size=12), "a tokenizer of 17 tokens, a Q-Former of 12"),
        (forget("config.json"), "config.json"),
        (forget("preprocessor_config.json"), "no preprocessor_config.json"),
        (forget("tokenizer.json"), "neither tokenizer.json nor vocab.txt"),
        (forget("model.safetensors"), "neither model.safetensors nor pytorch_model.bin"),
        (break_file("config.json"), "config.json"),
        (break_file("tokenizer.json"), "tokenizer.json"),
        (break_file("model.safetensors"), "model.safetensors"),
    ],
)
def test_spoilt_folders(hub_folder, spoil, message):
    spoil(hub_folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_hub(str(hub_folder))
    assert "\n" not in str(caught.value)


def test_other_architectures_are_named(hub_folder):
    file = hub_folder / "config.json"
    edit_json(file, architectures=["Blip2ForConditionalGeneration"])
    with pytest.raises(CheckpointError, match="is Blip2ForConditionalGeneration, not Blip2ForI"):
        load_hub(str(hub_folder))
    edit_json(file, architectures=None, model_type="clip")
    with pytest.raises(CheckpointError, match="of model type 'clip'"):
        load_hub(str(hub_folder))


# ---- the hub, as if it were there ------------------------------------------------------------------


def test_only_what_is_needed_is_fetched(hub_folder, monkeypatch):
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(hub_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model = load_model("blip2-itm-vit-g", device="cpu")
    assert model.config.name == "Salesforce/blip2-itm-vit-g"
    assert [name for name, _ in asked] == ["Salesforce/blip2-itm-vit-g"] * 2
    assert not any("model" in pattern for pattern in asked[0][1])
    assert not any("bin" in pattern for pattern in asked[1][1])

    asked.clear()
    edit_json(hub_folder / "config.json", architectures=["CLIPModel"])
    with pytest.raises(CheckpointError, match="CLIPModel"):
        load_model("someone/else", device="cpu")
    assert len(asked) == 1  # refused before the gigabytes


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (LocalEntryNotFoundError("no route\nto host"), "hub cannot be reached"),
        (ConnectionError("proxy says no\nand more"), "proxy says no$"),
    ],
)
def test_hub_errors_are_one_sentence(monkeypatch, error, message):
    def snapshot_download(name, allow_patterns):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match=f"someone/else.*{message}") as caught:
        load_model("someone/else", device="cpu")
    assert "\n" not in str(caught.value)
