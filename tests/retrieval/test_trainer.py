"""Training: the schedule, the groups, and a tiny model that learns drawn shapes."""

import itertools
import json

import numpy as np
import pytest
import torch

from blip2_search.retrieval.data import CaptionedImage, read_karpathy
from blip2_search.retrieval.errors import DatasetError
from blip2_search.retrieval.feature_cache import encoder_tokens
from blip2_search.retrieval.metrics import recall_table
from blip2_search.retrieval.model import image_features, itc_similarities
from blip2_search.retrieval.trainer import (
    TrainConfig,
    learning_rate,
    parameter_groups,
    train,
)
from tiny import COLOURS, SHAPES, build_tiny_model


@pytest.fixture
def shapes(photos):
    return [
        CaptionedImage(
            path=path, captions=(f"a {path.stem}", f"{path.stem} on black"), group=path.stem
        )
        for path in (photos / f"{colour} {shape}.png" for colour in COLOURS for shape in SHAPES)
    ]


def test_learning_rate_warms_up_and_falls():
    config = TrainConfig(steps=110, warmup_steps=10, min_lr_ratio=0.1)
    rates = [learning_rate(step, config) for step in range(110)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1
    assert rates[60] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_parameter_groups_hold_every_trained_parameter_once(tiny_model):
    config = TrainConfig(steps=1)
    groups = parameter_groups(tiny_model, config)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in tiny_model.parameters() if p.requires_grad)
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decays[id(tiny_model.qformer.query_tokens)] == 0
    assert decays[id(tiny_model.temperature)] == 0
    assert decays[id(tiny_model.vision_proj.bias)] == 0
    assert decays[id(tiny_model.vision_proj.weight)] == config.weight_decay


def test_a_tiny_model_learns_drawn_shapes(shapes, tmp_path):
    model = build_tiny_model()
    encoder_before = [p.clone() for p in model.image_encoder.state_dict().values()]
    cache = encoder_tokens(model, [s.path for s in shapes], tmp_path / "cache")
    config = TrainConfig(
        steps=450,
        batch_size=18,
        lr=4e-3,
        warmup_steps=10,
        hard_negatives_from=150,
        validate_every=225,
    )
    log = tmp_path / "log.jsonl"
    history = train(model, shapes, cache, config, log_file=log, validate=lambda _: {"ir@1": 0.0})
    for loss in ("itc", "itm", "itg"):
        first, last = (np.mean([h[loss] for h in part]) for part in (history[:10], history[-10:]))
        assert last < 0.8 * first, loss
    tokens = model.normalise_tokens(torch.from_numpy(np.array(cache[:, 0])).float())
    features = image_features(model, tokens)
    scores = itc_similarities(model, features, [s.captions[0] for s in shapes])
    assert recall_table(scores, np.arange(18), ks=(1,))["ir@1"] > 90
    after = model.image_encoder.state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(encoder_before, after, strict=True))
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert [e["step"] for e in entries if "ir@1" in e] == [225, 450]


def test_training_is_deterministic(shapes, tmp_path):
    runs = []
    for _ in range(2):
        model = build_tiny_model()
        cache = encoder_tokens(model, [s.path for s in shapes], tmp_path / "cache", views=2)
        runs.append(train(model, shapes, cache, TrainConfig(steps=3, batch_size=8, seed=4)))
    assert runs[0] == runs[1]


def test_cache_views_are_drawn_once_and_the_first_is_the_image(shapes, tmp_path):
    model = build_tiny_model()
    paths = [s.path for s in shapes[:3]]
    cache = encoder_tokens(model, paths, tmp_path, views=3)
    assert cache.shape == (3, 3, 4, 256)
    assert cache.dtype == np.float16
    with torch.inference_mode():
        plain = model.image_encoder(torch.stack([model.image_transform(p) for p in paths]))
    assert np.allclose(cache[:, 0], plain.numpy(), atol=2e-2)
    assert not np.allclose(cache[:, 0], cache[:, 1], atol=2e-2)
    files = sorted(tmp_path.glob("*.npy"))
    encoder_tokens(model, paths, tmp_path, views=3)
    assert sorted(tmp_path.glob("*.npy")) == files
    encoder_tokens(model, paths, tmp_path, views=2)
    assert len(list(tmp_path.glob("*.npy"))) == len(files) + 1


def test_too_little_data_is_an_error(shapes, tmp_path):
    model = build_tiny_model()
    cache = encoder_tokens(model, [s.path for s in shapes], tmp_path)
    with pytest.raises(ValueError, match="fewer than a batch"):
        train(model, shapes, cache, TrainConfig(steps=1, batch_size=19))
    with pytest.raises(ValueError, match="batch_size"):
        TrainConfig(steps=1, batch_size=1)


def test_karpathy_files(tmp_path):
    file = tmp_path / "dataset.json"
    entry = {
        "filename": "a.jpg",
        "filepath": "val2014",
        "split": "val",
        "sentences": [{"raw": "A cat."}],
    }
    file.write_text(json.dumps({"images": [entry]}))
    (image,) = read_karpathy(file, tmp_path, ["val"])
    assert image.path == tmp_path / "val2014" / "a.jpg"
    assert image.captions == ("A cat.",)
    with pytest.raises(DatasetError, match="no image in the split"):
        read_karpathy(file, tmp_path, ["train"])
    file.write_text("[]")
    with pytest.raises(DatasetError, match="Karpathy"):
        read_karpathy(file, tmp_path)
    with pytest.raises(DatasetError, match="cannot read"):
        read_karpathy(tmp_path / "none.json", tmp_path)
