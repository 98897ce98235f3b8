"""`blip2-search train`, from a recipe to a model that indexes photographs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from blip2_search.retrieval.checkpoints import save_model
from blip2_search.retrieval.curves import read_log
from blip2_search.retrieval.encoders import TimmEncoder
from blip2_search.retrieval.recipe import recipe_names
from tiny import build_tiny_model

QUICK = """
[start]
checkpoint = "{checkpoint}"

[data]
views = 2

[train]
steps = {steps}
batch_size = 9
lr = 4e-3
precision = "fp32"
validate_every = 5
checkpoint_every = 5
hard_negatives_full = 50
"""


@pytest.fixture
def files(photos, tmp_path):
    """Return the arguments that every run here has, and its folder."""
    save_model(build_tiny_model(), tmp_path / "tiny")
    entries = [
        {"filename": path.name, "split": split, "sentences": [{"raw": f"a {path.stem}"}]}
        for path in sorted(photos.iterdir())
        for split in ("train", "val")
    ]
    (tmp_path / "data.json").write_text(json.dumps({"images": entries}))
    arguments = ["--data", tmp_path / "data.json", "--images", photos]
    return [*arguments, "--cache", tmp_path / "cache", "--out", tmp_path / "run"], tmp_path


def recipe(folder, steps):
    file = folder / "quick.toml"
    file.write_text(QUICK.format(checkpoint=folder / "tiny", steps=steps))
    return file


def test_a_run_leaves_a_model_that_indexes_photographs(run, files, photos):
    arguments, folder = files
    (photos / "broken.png").write_bytes(b"no image")
    data = json.loads((folder / "data.json").read_text())
    for split in ("train", "val"):
        broken = {**data["images"][0], "filename": "broken.png", "split": split}
        data["images"].insert(0, broken)
    (folder / "data.json").write_text(json.dumps(data))
    changes = ["--set", "train.calibration_images=9", "--tensorboard"]
    done = run("train", recipe(folder, 10), *arguments, *changes)
    assert done.stdout == ""
    assert "update 10 of 10: ITC " in done.stderr
    assert "update 5, validation: tr@1 " in done.stderr
    assert "broken.png: not an image" in done.stderr
    assert "1 image could not be read" in done.stderr
    assert "the ITM head is scaled by" in done.stderr
    out = folder / "run"
    with Image.open(out / "curves.png") as curves:
        assert curves.width > 1000
    updates, validations = read_log(out / "log.jsonl")
    assert [entry["step"] for entry in updates] == list(range(1, 11))
    assert [entry["step"] for entry in validations] == [5, 10]
    assert list((out / "tensorboard").iterdir())
    best = out / "best"
    assert f"--model {best}" in done.stderr
    run("index", photos, "--model", best, "--index", folder / "index")
    hits = run("query", "a red circle", "-k", 3, "--paths", "--index", folder / "index")
    assert len(hits.stdout.splitlines()) == 3


def test_a_run_is_interrupted_and_resumed(run, files):
    arguments, folder = files
    file = recipe(folder, 400)
    command = [sys.executable, "-m", "blip2_search.cli.app", "train", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [*command, *map(str, arguments)], stderr=subprocess.PIPE, text=True, env=environment
    )
    log = folder / "run" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and len(log.read_text().splitlines()) > 8):
        assert time.monotonic() < deadline
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 130, errors
    assert "with --resume goes on" in errors
    assert "Traceback" not in errors
    assert (folder / "run" / "curves.png").exists()
    done_before = len(read_log(log)[0])
    assert 8 <= done_before < 400

    again = run("train", file, *arguments, code=1)
    assert "holds a run already: --resume" in again.stderr
    other = run("train", file, *arguments, "--resume", "--set", "train.lr=1e-3", code=1)
    assert "another recipe: train.lr was 0.004, not 0.001" in other.stderr
    resumed = run("train", file, *arguments, "--resume")
    assert f"{400 - done_before:,} updates after {done_before:,} before" in resumed.stderr
    updates, _ = read_log(log)
    assert [entry["step"] for entry in updates] == list(range(1, 401))
    finished = run("train", file, *arguments, "--resume")
    assert "0 updates after 400 before" in finished.stderr


def test_captions_without_splits_are_divided(run, files, photos):
    _, folder = files
    lines = [f"{path.name},a {path.stem}" for path in sorted(photos.iterdir())]
    (folder / "captions.csv").write_text("\n".join(["path,caption", *lines]) + "\n")
    arguments = ["--data", folder / "captions.csv", "--images", photos, "--out", folder / "run"]
    settings = ["train.train_encoder=true", "data.views=0", "data.workers=0"]
    settings += ["data.validation_share=0.2", "train.calibration_images=4", "train.steps=2"]
    changes = [word for setting in settings for word in ("--set", setting)]
    done = run("train", recipe(folder, 10), *arguments, *changes)
    assert "best mean recall in validation" in done.stderr
    without = ["--set", "data.validation_share=0", "--out", folder / "other"]
    done = run("train", recipe(folder, 10), *arguments, *changes, *without)
    assert "nothing to validate with" in done.stderr
    assert (folder / "other" / "best" / "config.json").exists()
    empty = ["--set", 'data.splits=["training"]', "--out", folder / "third"]
    failed = run("train", recipe(folder, 10), *arguments, *changes, *empty, code=1)
    assert "no image in the split(s) training" in failed.stderr
    assert not (folder / "third").exists()


def test_training_sees_smaller_images_than_validation(run, files, monkeypatch):
    arguments, folder = files
    seen = []
    whole = TimmEncoder.forward
    monkeypatch.setattr(
        TimmEncoder, "forward", lambda self, x: (seen.append(x.shape[-1]), whole(self, x))[1]
    )
    changes = ["train.train_encoder=true", "data.views=0", "data.workers=0", "train.steps=1"]
    changes += ["data.image_size=80", "data.crop_size=48", "train.calibration_images=0"]
    changes += ["train.freeze_text=true"]
    settings = [word for change in changes for word in ("--set", change)]
    run("train", recipe(folder, 10), *arguments, *settings)
    assert seen[0] == 48
    assert set(seen[1:]) == {80}
    described = json.loads((folder / "run" / "best" / "config.json").read_text())
    assert described["preprocess"]["image_size"] == 80
    monkeypatch.setattr(TimmEncoder, "takes_any_size", property(lambda _: False, lambda *_: None))
    refused = run("train", recipe(folder, 10), *arguments, *settings, "--out", folder / "x", code=1)
    assert "data.crop_size is for encoders that take images of any size" in refused.stderr


def test_wrong_input_is_one_sentence(run, files, monkeypatch):
    arguments, folder = files
    file = recipe(folder, 2)
    assert "no recipe 'maxi'" in run("train", "maxi", *arguments, code=1).stderr
    nowhere = ["--data", folder / "none.json", "--out", folder / "other"]
    assert "cannot read" in run("train", file, *nowhere, code=1).stderr
    run("train", file, *arguments, "--images", folder, code=2)
    large = run("train", file, *arguments, "--set", "train.batch_size=99", code=1)
    assert "18 images are fewer than a batch of 99" in large.stderr
    from blip2_search.retrieval import training_run

    monkeypatch.setattr(training_run.importlib.util, "find_spec", lambda name: None)
    lacking = run("train", file, *arguments, "--resume", code=1)
    assert "matplotlib: pip install 'blip2-search[train]'" in lacking.stderr


def test_help_names_every_recipe(run):
    text = run("train", "--help").stdout
    for name in recipe_names():
        assert f"    {name} " in text or f"    {name}\n" in text
    assert "does not enlarge what ITC contrasts" in " ".join(text.split())


def test_mini_starts_from_its_ancestors():
    from blip2_search.retrieval.recipe import read_recipe
    from blip2_search.retrieval.start import starting_model
    from blip2_search.retrieval.validation import mean_query_cosine

    model = starting_model(read_recipe("mini")).eval()
    noise = Image.effect_noise((64, 64), 80)
    assert mean_query_cosine(model.encode_images([noise])) < 0.5
    shipped = Path(__file__).parents[2] / "retrieval/models/mini/config.json"
    assert json.loads(shipped.read_text())["qformer"] == model.config.to_dict()["qformer"]
