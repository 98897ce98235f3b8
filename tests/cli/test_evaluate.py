"""`blip2-search evaluate`, on a tiny model and drawn photographs."""

import csv
import json

import pytest

from blip2_search.retrieval import report
from blip2_search.retrieval.checkpoints import save_model
from tiny import build_tiny_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_model(build_tiny_model(), folder)
    return folder


@pytest.fixture
def root(photos, tmp_path):
    """Return a root of benchmarks with the 18 photographs as Flickr30K's test split."""
    folder = tmp_path / "data" / "flickr30k"
    folder.mkdir(parents=True)
    photos.rename(folder / "flickr30k-images")
    images = [
        {
            "filename": path.name,
            "split": "test" if i % 2 else "val",
            "sentences": [{"raw": path.stem}, {"raw": f"a {path.stem}"}],
        }
        for i, path in enumerate(sorted((folder / "flickr30k-images").iterdir()))
    ]
    (folder / "dataset_flickr30k.json").write_text(json.dumps({"images": images}))
    return tmp_path / "data"


@pytest.fixture
def evaluate(run, root, checkpoint, tmp_path):
    def evaluate(*more, code=0):
        return run(
            "evaluate", "--dataset", "flickr30k", "--root", root, "--model", checkpoint,
            "--cache", tmp_path / "cache", *more, code=code,
        )  # fmt: skip

    return evaluate


def test_a_table_for_people(evaluate, monkeypatch):
    monkeypatch.setitem(report.PUBLISHED_SIZE, "flickr30k", (9, 18))
    done = evaluate("--rerank", 4)
    assert done.stdout.startswith("flickr30k test: 9 images, 18 captions; ")
    rows = [line.split() for line in done.stdout.splitlines()]
    assert rows[1][:6] == ["TR@1", "TR@5", "TR@10", "IR@1", "IR@5", "IR@10"]
    assert any(row[:5] == ["ITC", "+", "ITM,", "4", "reranked"] for row in rows)
    # The published rows stand under the measured ones, and say so.
    assert any(
        row == ["BLIP-2", "ViT-g", "(published)", "97.6", "100.0", "100.0", "89.7", "98.1", "98.9"]
        for row in rows
    )
    assert "median rank, MRR" in done.stdout
    assert "pairs/s" in done.stdout


def test_published_rows_belong_to_the_whole_test_split(evaluate, monkeypatch):
    assert "published" not in evaluate("--rerank", 0).stdout  # 9 images are not the 1,000
    monkeypatch.setitem(report.PUBLISHED_SIZE, "flickr30k", (9, 18))
    assert "published" in evaluate("--rerank", 0).stdout
    assert "published" not in evaluate("--split", "val", "--rerank", 0).stdout
    assert "published" not in evaluate("--limit", 5, "--rerank", 0).stdout


def test_json_and_a_file_with_the_command(evaluate, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["blip2-search", "evaluate", "--dataset", "flickr30k"])
    done = evaluate("--json", "--out", tmp_path / "results" / "a.json", "--limit", 5)
    printed = json.loads(done.stdout)
    assert (printed["dataset"], printed["split"], printed["images"]) == ("flickr30k", "test", 5)
    assert {"itc", "itc+itm", "fingerprint", "intervals", "seconds"} <= printed.keys()
    written = json.loads((tmp_path / "results" / "a.json").read_text())
    assert written["command"] == "blip2-search evaluate --dataset flickr30k"
    assert {"date", "version"} <= written.keys()
    assert written["itc"] == printed["itc"]


def test_a_sweep_prints_and_draws(evaluate, tmp_path):
    picture = tmp_path / "sweep.png"
    done = evaluate("--sweep-rerank", "0,2,8", "--plot", picture, "--directions", "ir")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "rerank IR@1 IR@5 IR@10 ITM ms with encoding ms" in " ".join(done.stdout.split())
    assert "TR@1" not in done.stdout
    assert "picture: " in done.stderr


def test_the_backend_decides_how_and_not_what(evaluate):
    found = {}
    for backend in ("onnx", "torch"):
        done = evaluate("--model", "mini", "--rerank", 3, "--backend", backend, "--json")
        found[backend] = json.loads(done.stdout)
    for name in ("itc", "itc+itm"):
        assert found["onnx"][name] == pytest.approx(found["torch"][name], abs=12)
    failed = evaluate("--model", "mini", "--backend", "onnx", "--precision", "bf16", code=1)
    assert "computes in fp32" in failed.stderr


def test_through_the_index(evaluate, tmp_path):
    dense = json.loads(evaluate("--json", "--dense").stdout)
    through = json.loads(evaluate("--json", "--through-index", tmp_path / "index").stdout)
    assert (dense["candidates"], through["candidates"]) == ("dense", "index")
    assert through["itc"] == pytest.approx(dense["itc"])
    assert "through its index" in evaluate("--through-index", tmp_path / "index").stdout


def test_ones_own_table_needs_no_split(run, photos, checkpoint, tmp_path):
    with (tmp_path / "mine.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "caption"])
        writer.writerows([path.name, f"a {path.stem}"] for path in photos.iterdir())
    (photos / "red bar.png").write_bytes(b"broken")
    arguments = ["evaluate", "--data", tmp_path / "mine.csv", "--images", photos]
    arguments += ["--model", checkpoint, "--cache", tmp_path / "cache", "--rerank", 0]
    done = run(*arguments)
    assert done.stdout.startswith("mine: 17 images, 17 captions")
    assert "red bar.png: not an image" in done.stderr
    assert "1 image could not be read: the figures are of the others" in done.stderr
    missing = run(*arguments, "--split", "val", code=1)
    assert "has no image in the split val: it names no splits" in missing.stderr


def test_judgements(run, photos, checkpoint, tmp_path):
    with (tmp_path / "rated.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption", "rating"])
        for i, path in enumerate(sorted(photos.iterdir())):
            writer.writerow([path.name, path.stem, i % 4])
    arguments = ["evaluate", "--judgements", tmp_path / "rated.csv", "--images", photos]
    arguments += ["--model", checkpoint, "--cache", tmp_path / "cache"]
    done = run(*arguments)
    assert done.stdout.startswith("rated: 18 pairs, 18 ratings; ")
    assert "tau-b tau-c" in " ".join(done.stdout.split())
    assert json.loads(run(*arguments, "--json").stdout)["tau"].keys() == {"itc", "itm", "itc+itm"}
    for more in (["--dataset", "coco"], ["--rerank", 4], ["--limit", 3]):
        assert f"it excludes {more[0]}" in run(*arguments, *more, code=2).stderr


def test_what_cannot_be_written_is_known_before_the_work(evaluate, tmp_path):
    (tmp_path / "file").write_text("")
    done = evaluate("--out", tmp_path / "file" / "a.json", code=1)
    assert "cannot write" in done.stderr
    done = evaluate("--sweep-rerank", "0,2", "--plot", "sweep.jpg", code=1)
    assert "--plot sweep.png" in done.stderr


def test_the_index_remembers_a_model_that_can_be_loaded(evaluate, checkpoint, tmp_path, run):
    evaluate("--rerank", 0, "--through-index", tmp_path / "index")
    found = json.loads(run("info", "--index", tmp_path / "index", "--json").stdout)
    assert found["model_name"] == str(checkpoint)
    run("query", "a red bar", "--index", tmp_path / "index", "--rerank", 0)


def test_what_is_missing_is_said_with_its_place(run, tmp_path):
    root = tmp_path / "nowhere"
    for name, image_folder in (("flickr30k", "flickr30k-images"), ("coco", "val2014")):
        error = run("evaluate", "--dataset", name, "--root", root, code=1).stderr
        assert f"{root / name / f'dataset_{name}.json'}" in error
        assert f"{root / name / image_folder}" in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        ["--data", "a.json"],  # and --dataset, below
        ["--images", "photos"],
        ["--sweep-rerank", "1,x"],
        ["--sweep-rerank", "-1"],
        ["--memory", "much"],
        ["--through-index", "a", "--dense"],
        ["--precision", "fp8"],
    ],
)
def test_wrong_usage_is_2(run, wrong):
    run("evaluate", *wrong, *(["--dataset", "coco"] if wrong else []), code=2)


def test_ctrl_c_says_what_is_kept(evaluate, monkeypatch):
    from blip2_search.retrieval import evaluation

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "match_pairs", interrupt)
    done = evaluate("--rerank", 4, code=130)
    assert "the same command goes on" in done.stderr
