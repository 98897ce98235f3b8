"""The shipped recipes, and the models that they start from, at tiny size."""

import pytest
import torch
import transformers
from foreign import VOCABULARY, hub_model, save_hub, wordpiece
from safetensors.torch import load_file, save_file

from blip2_search.retrieval import start as start_module
from blip2_search.retrieval.checkpoints import save_model
from blip2_search.retrieval.config import EncoderConfig, ModelConfig, QFormerConfig
from blip2_search.retrieval.errors import CheckpointError, RecipeError
from blip2_search.retrieval.loading import load_model
from blip2_search.retrieval.recipe import (
    DataConfig,
    Recipe,
    StartConfig,
    TrainConfig,
    read_recipe,
    recipe_names,
    with_total_steps,
)
from blip2_search.retrieval.start import new_model, resize_images, starting_model
from blip2_search.retrieval.trainer import Trainer
from tiny import build_tiny_model

WORDS = ["a", "the", "red", "bus", "cat", "on"]
TINY_QFORMER = {
    "num_layers": 2, "hidden_size": 32, "num_heads": 4, "ffn_size": 64, "num_queries": 8,
    "vocab_size": len(VOCABULARY), "max_positions": 40,
}  # fmt: skip


@pytest.fixture(scope="module")
def bert():
    config = transformers.BertConfig(
        vocab_size=len(VOCABULARY) - 1, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=64, max_position_embeddings=40,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.BertModel(config, add_pooling_layer=False).eval()


@pytest.fixture
def bert_folder(bert, tmp_path):
    """Return a BERT as the hub has it, [DEC] not yet in its vocabulary."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    folder = tmp_path / "bert"
    bert.save_pretrained(folder)
    ids = {word: i for i, word in enumerate(VOCABULARY[:-1])}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def tiny_config(**qformer):
    return ModelConfig(
        name="t",
        encoder=EncoderConfig(kind="timm", name="test_efficientnet", pool=2),
        qformer=QFormerConfig(**{**TINY_QFORMER, "image_token_size": 256, **qformer}),
        embedding_size=16,
    )


PAPER = {  # (lr, min_lr, batch, steps or epochs, weight decay), of the paper's two columns
    "pretrain-vit-g": (1e-4, 1e-5, 1680, 250_000, 0.05),
    "pretrain-vit-l": (1e-4, 1e-5, 2320, 250_000, 0.05),
    "finetune-coco-vit-g": (1e-5, 0.0, 224, 5, 0.05),
}


def test_every_recipe_is_read_and_the_published_ones_say_what_was_published():
    assert set(PAPER) | {"mini", "mini-finetune", "mini-queries"} == set(recipe_names())
    for name in recipe_names():
        recipe = read_recipe(name)
        again = Recipe.from_dict(name, recipe.to_dict())
        assert again == recipe
    for name, (lr, min_lr, batch, length, decay) in PAPER.items():
        train = read_recipe(name).train
        assert (train.lr, train.min_lr, train.batch_size) == (lr, min_lr, batch)
        assert (train.steps or train.epochs, train.weight_decay) == (length, decay)
        assert train.betas == (0.9, 0.98)
        assert train.itm_anchors is None
        assert train.hard_negatives_full == 0
    finetune = read_recipe("finetune-coco-vit-g")
    assert finetune.train.layer_decay == 0.95
    assert finetune.train.gradient_checkpointing
    assert finetune.data.image_size == 364
    for size in ("vit-g", "vit-l"):
        model = read_recipe(f"pretrain-{size}").model
        assert model.qformer == QFormerConfig(image_token_size=1408 if size == "vit-g" else 1024)
        assert not read_recipe(f"pretrain-{size}").train.train_encoder


def step(recipe, model, side):
    """Do one update on noise."""

    class Noise:
        encoded = False
        images = 8
        captions = None

        def batches(self, batch_size, first, seed, world):
            from blip2_search.retrieval.batches import Batch

            pixels = torch.randn(4, 3, side, side)
            yield Batch(pixels, ["a cat", "the bus", "two cats", "a"], torch.arange(4), [])

    from dataclasses import replace

    config = replace(recipe.train, steps=1, epochs=None, batch_size=4, precision="fp32")
    (numbers,) = Trainer(model, Noise(), config).run()
    return numbers


@pytest.mark.parametrize("name", ["pretrain-vit-g", "pretrain-vit-l", "mini"])
def test_a_new_model_of_every_recipe_at_tiny_size(name, bert_folder, tiny_clip):
    tower = {"pretrain-vit-g": "tiny-eva", "pretrain-vit-l": "tiny-clip"}.get(name)
    changes = [f"start.bert={bert_folder}", "start.encoder=''"]
    changes += [f"model.qformer.{key}={value}" for key, value in TINY_QFORMER.items()]
    if tower is not None:
        changes += [f"model.encoder.name={tower}", "model.encoder.pretrained=none"]
        side = 224 if tower == "tiny-eva" else 28
    else:
        changes += ["model.encoder.name=test_efficientnet", "model.encoder.pool=2"]
        changes += ["model.qformer.image_token_size=256", "model.image_positions=4"]
        changes += [f"start.query_words={WORDS}"]
        side = 64
    changes += [f"model.preprocess.image_size={side}"]
    if tower is not None:
        probe = start_module.new_model(
            read_recipe(name, changes).model, str(bert_folder)
        ).image_encoder(torch.zeros(1, 3, side, side))
        changes += [f"model.qformer.image_token_size={probe.shape[-1]}"]
    recipe = read_recipe(name, changes)
    numbers = step(recipe, starting_model(recipe), side)
    assert {"itc", "itm", "itg"} <= set(numbers)


def test_fine_tuning_on_coco_at_tiny_size(tmp_path):
    folder = save_hub(hub_model(), tmp_path / "hub")
    changes = [f"start.checkpoint={folder}", "data.image_size=42", "train.warmup_steps=0"]
    recipe = read_recipe("finetune-coco-vit-g", changes)
    model = starting_model(recipe)
    assert model.config.preprocess.image_size == 42
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    numbers = step(recipe, model, 42)
    assert "itg" not in numbers
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert "image_encoder.vision_model.encoder.layers.0.mlp.fc1.weight" in changed
    # What is saved is rebuilt at the new size.
    save_model(model, tmp_path / "saved")
    again = load_model(tmp_path / "saved", device="cpu")
    assert again.config.preprocess.image_size == 42


def test_a_query_half_is_renewed_and_the_text_half_stays(tmp_path):
    old = build_tiny_model()
    for layer in old.qformer.layers:
        torch.nn.init.normal_(layer.query_ffn.up.weight)
    save_model(old, tmp_path / "m")
    changes = [f"start.checkpoint={tmp_path / 'm'}", "start.renew_queries=true"]
    new = starting_model(read_recipe("mini-finetune", changes))
    text = old.tokenize(["a cat", "two dogs and a bus"])
    old.eval(), new.eval()
    assert torch.allclose(new.text_features(text), old.text_features(text), atol=1e-3)  # in fp16
    for layer, before in zip(new.qformer.layers, old.qformer.layers, strict=True):
        assert torch.equal(layer.query_ffn.up.weight, layer.text_ffn.up.weight)
        if layer.cross_attention is not None:
            assert (layer.cross_attention.value.weight - before.cross_attention.value.weight).any()
    assert (new.qformer.query_tokens - old.qformer.query_tokens).abs().min() > 0
    assert new.fingerprint != old.fingerprint


def test_mini_finetune_starts_from_any_checkpoint(tmp_path):
    save_model(build_tiny_model(), tmp_path / "m")
    recipe = read_recipe("mini-finetune", [f"start.checkpoint={tmp_path / 'm'}"])
    model = starting_model(recipe)
    assert {"itc", "itm"} <= set(step(recipe, model, 64))


def test_text_features_start_as_those_of_the_bert(bert, bert_folder):
    model = new_model(tiny_config(), str(bert_folder)).eval()
    text = model.tokenize(["a red bus", "two cats on the grass"])
    assert model.text_transform.tokenizer.token_to_id("[DEC]") == len(VOCABULARY) - 1
    mask = (text.mask[:, None, None, :]).expand(-1, 1, text.mask.shape[1], -1)
    with torch.no_grad():
        ours = model.qformer(token_ids=text.token_ids, mask=mask).text
        theirs = bert(input_ids=text.token_ids, attention_mask=text.mask).last_hidden_state
    torch.testing.assert_close(ours[text.mask], theirs[text.mask], atol=1e-5, rtol=1e-4)
    query, text_ffn = (getattr(model.qformer.layers[0], name) for name in ("query_ffn", "text_ffn"))
    assert torch.equal(query.up.weight, text_ffn.up.weight)


def test_the_prediction_head_of_a_bert_is_taken_over(bert_folder):
    file = bert_folder / "model.safetensors"
    head = {
        "cls.predictions.transform.dense.weight": torch.randn(32, 32),
        "cls.predictions.transform.dense.bias": torch.randn(32),
        "cls.predictions.transform.LayerNorm.gamma": torch.randn(32),
        "cls.predictions.transform.LayerNorm.beta": torch.randn(32),
        "cls.predictions.bias": torch.randn(len(VOCABULARY) - 1),
    }
    save_file({**load_file(file), **head}, file)
    model = new_model(tiny_config(), str(bert_folder))
    assert torch.equal(
        model.lm_head.transform.weight, head["cls.predictions.transform.dense.weight"]
    )
    assert torch.equal(model.lm_head.norm.bias, head["cls.predictions.transform.LayerNorm.beta"])
    assert torch.equal(model.lm_head.bias[:-1], head["cls.predictions.bias"])
    assert model.lm_head.bias[-1] == 0


def test_the_names_of_old_berts_are_understood(bert_folder):
    file = bert_folder / "model.safetensors"
    new = new_model(tiny_config(), str(bert_folder))
    tensors = {
        "bert."
        + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file)
    old = new_model(tiny_config(), str(bert_folder))
    for name in ("embedding_norm.weight", "layers.1.text_ffn.norm.bias"):
        assert torch.equal(old.qformer.state_dict()[name], new.qformer.state_dict()[name])


def test_what_does_not_fit_is_named(bert_folder):
    with pytest.raises(CheckpointError, match=r"layers\.0\..*\(32, 32\) is not \(16, 16\)|is not"):
        new_model(tiny_config(hidden_size=16, ffn_size=64), str(bert_folder))
    with pytest.raises(CheckpointError, match="no BERT of this depth: it lacks"):
        new_model(tiny_config(num_layers=3), str(bert_folder))
    recipe = Recipe(
        name="x", train=TrainConfig(steps=1), model=tiny_config(),
        start=StartConfig(bert=str(bert_folder), query_words=("a", "red")),
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="8 query tokens start from 6 words"):
        starting_model(recipe)
    with pytest.raises(CheckpointError, match="not-there is not installed: pip install not-there"):
        new_model(tiny_config(), "pip:not-there")


def test_resizing_keeps_what_a_vit_sees():
    model = load_own_tiny_vit()
    before = model.fingerprint
    resize_images(model, 28)
    assert model.fingerprint == before
    resize_images(model, 56)
    assert model.image_transform.size == (56, 56)
    assert model.config.encoder.vision_config["image_size"] == 56
    assert model.image_encoder(torch.randn(1, 3, 56, 56)).shape[1] == 17


def load_own_tiny_vit():
    from blip2_search.retrieval.model import RetrievalModel
    from blip2_search.retrieval.preprocess import TextTransform

    vision = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1,
        "intermediate_size": 16, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = ModelConfig.from_dict(
        {
            "name": "t",
            "encoder": {"kind": "blip2_vision", "vision_config": vision},
            "qformer": {**TINY_QFORMER, "image_token_size": 16},
            "preprocess": {"image_size": 28},
        }
    )
    return RetrievalModel(config, TextTransform(wordpiece(), config.preprocess))


def test_changes_are_read_as_toml():
    recipe = read_recipe("mini", ["train.lr=1e-5", "data.flip=false", "train.itm_anchors=none"])
    assert recipe.train.lr == 1e-5
    assert recipe.data.flip is False
    assert recipe.train.itm_anchors is None
    assert read_recipe("mini-finetune", ["start.checkpoint=a/b c"]).start.checkpoint == "a/b c"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["lr=1"], "is not table.key=value"),
        (["train.lr"], "is not table.key=value"),
        (["train.speed=1"], "unknown field.*speed"),
        (["speed.train=1"], "unknown table.*speed"),
        (["train.epochs=1"], "steps or epochs, and not both"),
        (["train.precision=int8"], "train.precision cannot be 'int8'"),
        (["data.flip=False"], "data.flip cannot be 'False': it is bool"),
        (["train.lr=fast"], "train.lr cannot be 'fast': it is float"),
        (["train.batch_size=64.0"], "train.batch_size cannot be 64.0: it is int"),
        (["train.betas=[0.9]"], "train.betas cannot be"),
        (["train.itm_anchors=0"], "itm_anchors must be at least 1"),
        (["train.steps=true"], "train.steps cannot be True"),
        (["train.train_encoder=true"], "data.views caches a frozen encoder"),
        (["start.checkpoint=mini"], "either a checkpoint or a bert"),
        (["start.renew_queries=true"], "renew_queries is for a checkpoint"),
        (["start.checkpoint=mini", "start.bert=''"], "query_words are for a new query half"),
        (["data.captions_per_image=0"], "captions_per_image is at least 1"),
        (["data.views=0", "data.rows=captions", "data.captions_per_image=5"], "one caption"),
        (["data.crop_scale=[0.9, 0.5]"], "crop_scale"),
        (["data.views=0", "data.crop_size=0"], "crop_size is at least 1"),
        (["data.crop_size=200"], "it excludes data.crop_size"),
    ],
)
def test_recipes_that_make_no_sense(changes, message):
    with pytest.raises(RecipeError, match=message):
        read_recipe("mini", changes)


def test_recipes_that_are_not_there(tmp_path):
    with pytest.raises(RecipeError, match=r"no recipe 'maxi': .*one of .*mini"):
        read_recipe("maxi")
    (tmp_path / "bad.toml").write_text("[train")
    with pytest.raises(RecipeError, match=r"bad\.toml"):
        read_recipe(tmp_path / "bad.toml")


def test_epochs_are_counted_out():
    config = TrainConfig(epochs=2.5, batch_size=8, accumulate=2)
    assert with_total_steps(config, 35).steps == 5  # 4 whole batches an epoch
    with pytest.raises(RecipeError, match="5 images are fewer than a batch of 8"):
        with_total_steps(config, 5)
    with pytest.raises(RecipeError, match="length of a stream is unknown"):
        with_total_steps(config, None)
    assert DataConfig().views == 0
