"""The loop: a tiny model learns drawn shapes, resumes bit for bit, and keeps what it should."""

import copy
import itertools
import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from blip2_search.retrieval.batches import CachedTokens, DrawnImages
from blip2_search.retrieval.data import CaptionedImage
from blip2_search.retrieval.errors import RecipeError, TrainingError
from blip2_search.retrieval.feature_cache import encoder_tokens
from blip2_search.retrieval.frozen_parts import FrozenTexts
from blip2_search.retrieval.loading import load_model
from blip2_search.retrieval.optimizer import (
    freeze_unused,
    hardness,
    learning_rate,
    parameter_groups,
)
from blip2_search.retrieval.recipe import DataConfig, Recipe, StartConfig, TrainConfig
from blip2_search.retrieval.run_folder import RunFolder
from blip2_search.retrieval.trainer import Trainer, pick_precision
from blip2_search.retrieval.validation import Validator, mean_query_cosine, queries_used
from tiny import COLOURS, SHAPES, build_tiny_model, draw_scene

QUICK = {"batch_size": 8, "lr": 4e-3, "precision": "fp32"}


@pytest.fixture
def shapes(photos):
    return [
        CaptionedImage(
            path=path, captions=(f"a {path.stem}", f"{path.stem} on black"), group=path.stem
        )
        for path in (photos / f"{colour} {shape}.png" for colour in COLOURS for shape in SHAPES)
    ]


def cached(model, shapes, folder, views=1):
    paths = [image.path for image in shapes]
    return encoder_tokens(model, paths, folder, DataConfig(), views=views)


def trainer(shapes, tmp_path, config, **settings):
    """Return a trainer of a fresh tiny model, on its cached tokens."""
    model = build_tiny_model()
    if config.train_encoder:
        source = DrawnImages(shapes, model.image_transform, DataConfig(workers=0))
    else:
        source = CachedTokens(shapes, cached(model, shapes, tmp_path / "cache", views=2))
    if config.freeze_text:
        settings["frozen_texts"] = FrozenTexts(model, source.captions, model.text_transform)
    return Trainer(model, source, config, **settings)


def test_learning_rate_warms_up_and_falls():
    config = TrainConfig(steps=110, lr=2.0, min_lr=0.2, warmup_lr=0.4, warmup_steps=10)
    rates = [learning_rate(step, config) for step in range(111)]
    assert rates[0] == pytest.approx(0.4)
    assert rates[5] == pytest.approx(1.2)
    assert rates[10] == 2
    assert rates[60] == pytest.approx(1.1)
    assert rates[110] == pytest.approx(0.2)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_negatives_harden_at_once_where_no_ramp_is_wanted():
    assert hardness(0, TrainConfig(steps=1)) == 1.0
    steep = TrainConfig(steps=9, hard_negatives_from=5, hard_negatives_full=5)
    assert [hardness(step, steep) for step in (4, 5)] == [0.0, 1.0]


def test_parameter_groups_hold_every_trained_parameter_once():
    model = build_tiny_model()
    config = TrainConfig(
        steps=1, train_encoder=True, layer_decay=0.5, encoder_lr_scale=0.1, new_lr_scale=3.0
    )
    freeze_unused(model, config)
    groups = parameter_groups(model, config)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    of = {id(p): group for group in groups for p in group["params"]}
    assert of[id(model.qformer.query_tokens)]["weight_decay"] == 0
    assert of[id(model.temperature)]["weight_decay"] == 0
    assert of[id(model.vision_proj.bias)]["weight_decay"] == 0
    assert of[id(model.vision_proj.weight)]["weight_decay"] == config.weight_decay
    assert of[id(model.vision_proj.weight)]["lr_scale"] == 3.0
    assert of[id(model.qformer.word_embeddings.weight)]["lr_scale"] == 1.0
    scales = {name: of[id(p)]["lr_scale"] for name, p in model.image_encoder.named_parameters()}
    assert scales["backbone.conv_head.weight"] == pytest.approx(0.1 * 0.5)
    assert scales["backbone.conv_stem.weight"] < 0.1 * 0.5**4


def test_only_what_serves_an_objective_is_trained():
    model = build_tiny_model()
    freeze_unused(model, TrainConfig(steps=1, itm_weight=0, itg_weight=0))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(name.startswith(("image_encoder.", "itm_head", "lm_head")) for name in trained)
    assert "qformer.query_tokens" in trained
    freeze_unused(model, TrainConfig(steps=1, freeze_text=True))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"text_proj.weight", "qformer.query_tokens", "lm_head.bias"} <= trained
    halves = {name.split(".")[3] for name in trained if name.startswith("qformer.layers")}
    assert halves == {"cross_attention", "query_ffn"}
    freeze_unused(model, TrainConfig(steps=1, train_encoder=True, encoder_layers=1))
    encoder = {n: p.requires_grad for n, p in model.image_encoder.named_parameters()}
    assert encoder["backbone.conv_head.weight"]
    assert not encoder["backbone.conv_stem.weight"]


def test_a_tiny_model_learns_drawn_shapes(shapes, tmp_path):
    config = TrainConfig(
        steps=300, batch_size=18, lr=4e-3, warmup_steps=10, precision="fp32",
        hard_negatives_from=100, hard_negatives_full=150, validate_every=150,
    )  # fmt: skip
    told = []
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    run = trainer(shapes, tmp_path, config, folder=folder, observers=[told.append, folder.log])
    model = run.model
    encoder_before = [p.clone() for p in model.image_encoder.state_dict().values()]
    run._validate = Validator(shapes, cached(model, shapes, tmp_path / "cache"))
    history = run.run()
    for loss in ("itc", "itm", "itg"):
        first, last = (np.mean([h[loss] for h in part]) for part in (history[:10], history[-10:]))
        assert last < 0.8 * first, loss
    validations = {e["step"]: e["validation"] for e in told if "validation" in e}
    assert list(validations) == [150, 300]
    assert validations[300]["ir@1"] > 90
    assert validations[300]["tr@1"] > 90
    after = model.image_encoder.state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(encoder_before, after, strict=True))
    logged = [json.loads(line) for line in folder.log_file.read_text().splitlines()]
    assert logged == told
    # The best model is one that can be loaded, and is what was measured.
    best = load_model(folder.best)
    table = Validator(shapes)(best)
    assert table["mean_recall"] == pytest.approx(
        max(v["mean_recall"] for v in validations.values()), abs=2
    )


def test_a_tiny_model_learns_what_stands_left_of_what(tmp_path):
    """Thirty scenes of two shapes; the encoder is trained too, because a random one blurs them."""
    things = list(itertools.product(("red", "green", "blue"), ("circle", "bar")))
    scenes = []
    for left, right in itertools.permutations(things, 2):
        name = f"a {' '.join(left)} left of a {' '.join(right)}"
        draw_scene(left, right).save(tmp_path / f"{name}.png")
        path = tmp_path / f"{name}.png"
        scenes.append(CaptionedImage(path=path, captions=(name,), group=name))
    assert len(scenes) == 30
    model = build_tiny_model()
    config = TrainConfig(
        steps=200, batch_size=30, lr=3e-3, warmup_steps=20, precision="fp32", train_encoder=True,
        encoder_lr_scale=0.5, itm_weight=0, itg_weight=0, validate_every=200,
    )  # fmt: skip
    told = []
    source = DrawnImages(scenes, model.image_transform, DataConfig(augment=False, workers=0))
    Trainer(model, source, config, validate=Validator(scenes), observers=[told.append]).run()
    (table,) = [event["validation"] for event in told if "validation" in event]
    assert table["ir@1"] > 85
    assert table["tr@1"] > 85


def test_a_frozen_text_half_stays_and_the_queries_learn_to_match_it(shapes, tmp_path):
    model = build_tiny_model()
    for name, parameter in model.qformer.named_parameters():
        if "self_attention" in name and parameter.ndim == 2:
            parameter.data.mul_(10)  # a text half that tells captions apart
    source = CachedTokens(shapes, cached(model, shapes, tmp_path / "cache"), captions_per_image=2)
    config = TrainConfig(steps=250, freeze_text=True, itm_weight=0, itg_weight=0, **QUICK)
    text = model.tokenize([caption for image in shapes for caption in image.captions])
    model.eval()
    with torch.inference_mode():
        before = model.text_states(text)
    again = copy.deepcopy(model)
    texts = FrozenTexts(model, source.captions, model.text_transform)
    torch.testing.assert_close(texts(text), before, atol=1e-5, rtol=1e-5)
    history = Trainer(model, source, config, frozen_texts=texts).run()
    with torch.inference_mode():
        assert torch.equal(model.text_states(text), before)
    (without,) = Trainer(again, source, replace(config, steps=1)).run()
    assert history[0]["itc"] == pytest.approx(without["itc"], abs=1e-4)
    first, last = (np.mean([h["itc"] for h in p]) for p in (history[:10], history[-10:]))
    assert last < 0.8 * first


@pytest.mark.parametrize("objective", ["itc", "itm", "itg"])
def test_each_objective_alone_lowers_its_own_loss(shapes, tmp_path, objective):
    weights = {f"{name}_weight": float(name == objective) for name in ("itc", "itm", "itg")}
    hard = {"hard_negatives_from": 999, "hard_negatives_full": 999}  # uniform: ITC learns nothing
    config = TrainConfig(steps=150, **{**QUICK, "batch_size": 18}, **weights, **hard)
    history = trainer(shapes, tmp_path, config).run()
    first, last = (np.mean([h[objective] for h in p]) for p in (history[:10], history[-10:]))
    assert last < 0.8 * first
    assert history[-1]["loss"] == pytest.approx(history[-1][objective])


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"ema_decay": 0.9},
        {"freeze_text": True},
        {"train_encoder": True, "encoder_layers": 2},
    ],
)
def test_a_resumed_run_is_the_tail_of_an_uninterrupted_one(shapes, tmp_path, more):
    def config(steps):
        return TrainConfig(
            steps=steps, **QUICK, checkpoint_every=3, keep_checkpoints=2, warmup_steps=2,
            attention_dropout=0.1, accumulate=2, **more,
        )  # fmt: skip

    whole = trainer(shapes, tmp_path, config(8))
    expected = whole.run()
    folder = RunFolder(tmp_path / "run")

    interrupted = trainer(shapes, tmp_path, config(8), folder=folder)

    def interrupt(event):
        if event["step"] == 5:
            os.kill(os.getpid(), signal.SIGINT)

    interrupted._observers = [interrupt]
    with pytest.raises(KeyboardInterrupt):
        interrupted.run()
    assert [p.name for p in folder.checkpoints()] == ["step-000003", "step-000005"]

    resumed = trainer(shapes, tmp_path, config(8), folder=folder)
    assert folder.restore(resumed.state)
    assert resumed.state.step == 5
    tail = resumed.run()
    for ours, theirs in zip(tail, expected[5:], strict=True):
        ours.pop("pairs_per_second"), theirs.pop("pairs_per_second")
        assert ours == theirs
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert [p.name for p in folder.checkpoints()] == ["step-000006", "step-000008"]


def test_a_half_written_checkpoint_is_never_read(shapes, tmp_path):
    folder = RunFolder(tmp_path / "run")
    config = TrainConfig(steps=2, **QUICK, checkpoint_every=1)
    trainer(shapes, tmp_path, config, folder=folder).run()
    (folder.path / "checkpoints" / "step-000009.partial").mkdir()
    assert [p.name for p in folder.checkpoints()] == ["step-000001", "step-000002"]
    (folder.checkpoints()[-1] / "state.pt").write_bytes(b"torn")
    again = trainer(shapes, tmp_path, config)
    with pytest.raises(TrainingError, match="step-000002 cannot be resumed"):
        folder.restore(again.state)


def test_accumulated_gradients_are_the_mean_of_the_batches(shapes, tmp_path):
    weights = {"itm_weight": 0.0, "itg_weight": 0.0}
    one = trainer(shapes, tmp_path, TrainConfig(steps=1, **QUICK, **weights, accumulate=2))
    two = trainer(shapes, tmp_path, TrainConfig(steps=2, **QUICK, **weights))
    batches = one.source.batches(8, 0, 0, one.world)
    gradients = []
    for _ in range(2):
        two._backward(next(batches), 0)
        gradients.append(two.model.vision_proj.weight.grad.clone())
        two.model.zero_grad()
    batches = one.source.batches(8, 0, 0, one.world)
    one._backward(next(batches), 0)
    one._backward(next(batches), 1)
    expected = (gradients[0] + gradients[1]) / 2
    torch.testing.assert_close(one.model.vision_proj.weight.grad, expected)


def test_the_encoder_is_trained_where_it_should_be(shapes, tmp_path):
    model = build_tiny_model()
    before = {n: p.clone() for n, p in model.image_encoder.state_dict().items()}
    source = DrawnImages(shapes, model.image_transform, DataConfig(workers=0))
    config = TrainConfig(steps=2, **QUICK, train_encoder=True, gradient_checkpointing=True)
    Trainer(model, source, config).run()
    after = model.image_encoder.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "backbone.conv_stem.weight" in changed
    assert not any("running" in name for name in changed)


def test_the_average_of_the_weights_is_what_remains(shapes, tmp_path):
    config = TrainConfig(steps=3, **QUICK, ema_decay=0.5)
    run = trainer(shapes, tmp_path, config)
    seen = [run.model.vision_proj.weight.detach().clone()]
    run._observers = [lambda event: seen.append(run.model.vision_proj.weight.detach().clone())]
    run.run()
    average = seen[1]
    for weights in seen[2:]:
        average = 0.5 * average + 0.5 * weights
    torch.testing.assert_close(run.model.vision_proj.weight.detach(), average)


def test_a_loss_that_is_no_number_stops_the_run(shapes, tmp_path):
    run = trainer(shapes, tmp_path, TrainConfig(steps=3, **QUICK))
    torch.nn.init.constant_(run.model.vision_proj.weight, float("nan"))
    with pytest.raises(TrainingError, match=r"loss of update 1 is nan.*lower train\.lr"):
        run.run()


def test_gradients_that_are_no_numbers_are_not_applied(shapes, tmp_path):
    run = trainer(shapes, tmp_path, TrainConfig(steps=3, **QUICK))
    weight = run.model.vision_proj.weight
    before = weight.detach().clone()
    weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(TrainingError, match="gradient norm of update 1 is"):
        run.run()
    assert torch.equal(weight.detach(), before)


def test_a_batch_of_one(shapes, tmp_path):
    run = trainer(shapes, tmp_path, TrainConfig(steps=2, **{**QUICK, "batch_size": 1}))
    assert all(entry["itm"] == 0 for entry in run.run())


def test_half_precision_scales_its_losses(shapes, tmp_path):
    run = trainer(shapes, tmp_path, TrainConfig(steps=60, **{**QUICK, "precision": "fp16"}))
    assert run.state.scaler.is_enabled()
    losses = [entry["loss"] for entry in run.run()]
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])


def test_a_model_without_a_language_model_head(shapes, tmp_path):
    model = build_tiny_model()
    model.lm_head = None
    with pytest.raises(RecipeError, match=r"--set train\.itg_weight=0"):
        Trainer(model, None, TrainConfig(steps=1))


def test_training_is_deterministic(shapes, tmp_path):
    runs = [trainer(shapes, tmp_path, TrainConfig(steps=3, **QUICK, seed=4)).run() for _ in "ab"]
    for entry in (*runs[0], *runs[1]):
        entry.pop("pairs_per_second")
    assert runs[0] == runs[1]


def test_a_run_is_not_overwritten_and_keeps_its_recipe(tmp_path):
    def recipe(steps):
        train = TrainConfig(steps=steps)
        return Recipe(name="x", start=StartConfig(checkpoint="mini"), train=train)

    folder = RunFolder(tmp_path / "run")
    folder.check(recipe(5), ["a.json"], resume=True)
    folder.check(recipe(5), ["a.json"], resume=False)
    folder.begin(recipe(5), ["a.json"])
    folder.check(recipe(5), ["a.json"], resume=True)
    with pytest.raises(TrainingError, match="holds a run already: --resume"):
        folder.check(recipe(5), ["a.json"], resume=False)
    with pytest.raises(TrainingError, match=r"another recipe: train\.steps was 5, not 6"):
        folder.check(recipe(6), ["a.json"], resume=True)
    with pytest.raises(TrainingError, match="another recipe: files was"):
        folder.check(recipe(5), ["b.json"], resume=True)


def test_precision_is_what_the_processor_computes_in(monkeypatch):
    from blip2_search.retrieval import trainer as module

    cpu = torch.device("cpu")
    assert pick_precision("fp16", cpu) == "fp16"
    for has, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(module, "_cpu_has_bf16", lambda has=has: has)
        assert pick_precision("auto", cpu) == expected


def test_query_statistics_against_plain_loops(rng):
    features = rng.normal(size=(6, 4, 8)).astype(np.float32)
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    cosines = [
        image[i] @ image[j] for image in features for i in range(4) for j in range(4) if i != j
    ]
    assert mean_query_cosine(features) == pytest.approx(np.mean(cosines), abs=1e-6)
    assert mean_query_cosine(features[:, :1]) == 1.0
    # Each text is one of its image's queries: two win equally often, so two are used.
    texts = np.stack([features[i, i % 2] for i in range(6)])
    assert queries_used(features, texts) == pytest.approx(2.0)
