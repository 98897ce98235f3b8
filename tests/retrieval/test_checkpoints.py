"""Our own format: what is written is what is read, and what is wrong is said."""

import json
import os

import numpy as np
import pytest
import torch
from foreign import edit_json
from safetensors.torch import load_file, save_file

from blip2_search.retrieval import loading
from blip2_search.retrieval.checkpoints import save_model
from blip2_search.retrieval.errors import CheckpointError
from blip2_search.retrieval.loading import load_model
from tiny import COLOURS, build_tiny_model, draw

TEXTS = ["a red circle", "a blue bar on black"]
IMAGES = [draw(colour, "square") for colour in COLOURS[:2]]


@pytest.fixture
def folder(tiny_model, tmp_path):
    save_model(tiny_model, tmp_path / "model")
    return tmp_path / "model"


def test_round_trip(tiny_model, folder):
    again = load_model(folder, device="cpu")
    assert again.config == tiny_model.config
    assert again.fingerprint == tiny_model.fingerprint
    assert not again.training
    for name, tensor in tiny_model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    np.testing.assert_array_equal(again.encode_images(IMAGES), tiny_model.encode_images(IMAGES))
    np.testing.assert_array_equal(again.encode_texts(TEXTS), tiny_model.encode_texts(TEXTS))
    tokens = tiny_model.image_tokens(IMAGES)
    np.testing.assert_array_equal(again.match(tokens, TEXTS), tiny_model.match(tokens, TEXTS))


def test_the_folder_may_move(folder, tiny_model, monkeypatch):
    folder.rename(folder.parent / "elsewhere")
    monkeypatch.chdir(folder.parent)
    assert load_model("elsewhere", device="cpu").fingerprint == tiny_model.fingerprint


def test_half_precision_halves_matrices_only(tiny_model, folder, tmp_path):
    save_model(tiny_model, tmp_path / "half", torch.float16)
    stored = load_file(tmp_path / "half" / "model.safetensors")
    for name, tensor in tiny_model.state_dict().items():
        matrix = tensor.ndim >= 2
        assert stored[name].dtype == (torch.float16 if matrix else tensor.dtype), name
        if not matrix:
            assert torch.equal(stored[name], tensor), name
    sizes = [(f / "model.safetensors").stat().st_size for f in (folder, tmp_path / "half")]
    assert sizes[1] < 0.6 * sizes[0]
    again = load_model(tmp_path / "half", device="cpu")
    assert again.dtype == torch.float32
    np.testing.assert_allclose(again.encode_texts(TEXTS), tiny_model.encode_texts(TEXTS), atol=0.01)


def test_whole_numbers_stay_whole_in_half_precision(tmp_path):
    model = build_tiny_model()
    model.register_buffer("table", torch.full((2, 2), 70_001))
    save_model(model, tmp_path, torch.float16)
    table = load_file(tmp_path / "model.safetensors")["table"]
    assert table.dtype == torch.int64
    assert table.max() == 70_001


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_files(tiny_model, folder, monkeypatch, step):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="disk full"):
        save_model(build_tiny_model(seed=4), folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_overwriting(folder):
    other = build_tiny_model("other", seed=4)
    save_model(other, folder)
    assert load_model(folder, device="cpu").fingerprint == other.fingerprint
    assert sorted(file.name for file in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


# ---- fingerprint -----------------------------------------------------------------------------------


def test_fingerprint_survives_casts(folder, tiny_model):
    for dtype in ("float16", "bfloat16"):
        model = load_model(folder, device="cpu", dtype=dtype)
        assert model.dtype == getattr(torch, dtype)
        assert model.fingerprint == tiny_model.fingerprint
    model.float()
    assert model.fingerprint == tiny_model.fingerprint


def test_fingerprint_does_not_depend_on_the_name():
    assert build_tiny_model("one").fingerprint == build_tiny_model("two").fingerprint
    assert build_tiny_model(seed=1).fingerprint != build_tiny_model(seed=2).fingerprint


@pytest.mark.parametrize(
    "name",
    ["text_proj.weight", "ln_vision.bias", "temperature", "qformer.layers.1.text_ffn.up.bias"],
)
def test_fingerprint_sees_a_changed_weight(folder, name):
    file = folder / "model.safetensors"
    before = load_model(folder, device="cpu").fingerprint
    tensors = load_file(file)
    tensors[name] += 1e-3
    save_file(tensors, file)
    assert load_model(folder, device="cpu").fingerprint != before


def test_fingerprint_sees_changed_preprocessing(folder):
    before = load_model(folder, device="cpu").fingerprint
    config = json.loads((folder / "config.json").read_text())
    edit_json(folder / "config.json", preprocess=config["preprocess"] | {"image_size": 96})
    assert load_model(folder, device="cpu").fingerprint != before


# ---- errors ----------------------------------------------------------------------------------------


def change_tensors(folder, added=None, removed=()):
    file = folder / "model.safetensors"
    tensors = load_file(file) | (added or {})
    save_file({k: v for k, v in tensors.items() if k not in removed}, file)


def test_wrong_tensors_are_named(folder):
    change_tensors(folder, {"extra.weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"has unexpected extra\.weight$"):
        load_model(folder, device="cpu")
    change_tensors(folder, {"itm_head.bias": torch.zeros(3)}, ["extra.weight"])
    with pytest.raises(CheckpointError, match=r"itm_head\.bias is \(3,\), not \(2,\)$"):
        load_model(folder, device="cpu")
    change_tensors(folder, removed=["itm_head.bias", "temperature"])
    with pytest.raises(CheckpointError, match=r"lacks itm_head\.bias, temperature|lacks temp") as e:
        load_model(folder, device="cpu")
    assert "itm_head.bias" in str(e.value)


def test_a_long_list_of_keys_is_cut(folder):
    change_tensors(folder, {f"extra{i}": torch.zeros(1) for i in range(8)})
    with pytest.raises(CheckpointError, match=r"extra0, extra1, .*extra4 and 3 more$"):
        load_model(folder, device="cpu")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_missing_and_broken_files_are_named(folder, name):
    (folder / name).write_bytes(b"\x80 broken")
    with pytest.raises(CheckpointError, match=str(folder)):
        load_model(folder, device="cpu")
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        load_model(folder, device="cpu")


def test_unknown_and_missing_fields_of_the_configuration(folder):
    config = json.loads((folder / "config.json").read_text())
    edit_json(folder / "config.json", qformer=config["qformer"] | {"layers": 3})
    with pytest.raises(CheckpointError, match=r"qformer configuration: layers"):
        load_model(folder, device="cpu")
    edit_json(folder / "config.json", qformer=config["qformer"], encoder={})
    with pytest.raises(CheckpointError, match=r"incomplete encoder configuration.*kind"):
        load_model(folder, device="cpu")


def test_unknown_names(tmp_path):
    for name in ("clip", str(tmp_path / "nothing"), "./some/model", "a/b/c"):
        with pytest.raises(CheckpointError, match=r"no model .*neither a folder.*blip2-itm-vit-g"):
            load_model(name, device="cpu")


def test_unknown_device_and_dtype(folder):
    with pytest.raises(CheckpointError, match=r"unknown dtype 'int8'.*float16"):
        load_model(folder, device="cpu", dtype="int8")
    with pytest.raises(CheckpointError, match="device 'warp' cannot be used"):
        load_model(folder, device="warp")


def test_short_names_are_those_of_the_hub():
    assert loading.SHORT_NAMES["blip2-itm-vit-g-coco"] == "Salesforce/blip2-itm-vit-g-coco"
