"""The command line on real files: odd photographs, a run killed half-way, and queries in a pipe."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from blip2_search.retrieval.checkpoints import save_model
from tiny import build_tiny_model, draw

PROGRAM = [sys.executable, "-m", "blip2_search.cli.app"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_model(build_tiny_model(), folder)
    return folder


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    return {**os.environ, "BLIP2_SEARCH_INDEX": str(tmp_path / "index"), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def run(environment, tmp_path):
    def run(*arguments: object, code: int = 0, **more: object) -> subprocess.CompletedProcess[str]:
        command = [*PROGRAM, *map(str, arguments)]
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, **more
        )
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        return done

    return run


def hits(done: subprocess.CompletedProcess[str]) -> list[dict[str, object]]:
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_folder_of_odd_photographs(photos, run, checkpoint):
    whole = (photos / "red bar.png").read_bytes()
    (photos / "broken.jpg").write_bytes(whole[: len(whole) // 2])
    shutil.copy(photos / "red circle.png", photos / "copy of red circle.png")
    draw("blue", "square").save(photos / "площадь 広場 🌁.webp", lossless=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    draw("red", "bar").rotate(90).save(photos / "turned.jpg", exif=exif, quality=95)

    done = run("index", photos, "--model", checkpoint)
    assert done.stdout == ""
    assert "broken.jpg" in done.stderr
    assert "21" in run("info").stdout

    found = hits(run("query", "a red circle", "-k", 30, "--json"))
    assert [hit["rank"] for hit in found] == list(range(1, 22))
    assert set(found[0]) == {"rank", "path", "score", "itc", "itm"}
    scores = {Path(hit["path"]).name: hit["score"] for hit in found}
    assert "площадь 広場 🌁.webp" in scores
    assert scores["copy of red circle.png"] == pytest.approx(scores["red circle.png"], abs=1e-4)
    ordered = [hit["score"] for hit in found]
    assert ordered == sorted(ordered, reverse=True)

    all_of_them = ("--rerank", 30)  # otherwise the best ten only
    paths = run("query", "a red circle", "-k", 3, *all_of_them, "--paths").stdout.splitlines()
    assert paths == [hit["path"] for hit in found[:3]]
    table = run("query", "a red circle", "-k", 2, *all_of_them).stdout
    assert Path(paths[0]).name in table
    (twin,) = hits(run("query", "--image", photos / "red bar.png", "-k", 1, "--json"))
    assert Path(twin["path"]).name == "red bar.png"

    again = run("index", photos)
    assert "21 unchanged" in again.stderr


def test_a_killed_run_is_resumed(photos, run, checkpoint, environment, tmp_path):
    for i in range(120):
        draw(f"#{i * 9999 % 0xFFFFFF:06x}", "circle", 400).save(photos / f"{i:03}.png")
    slow = (
        "import sys, time\n"
        "from blip2_search.retrieval import indexer\n"
        "indexer.COMMIT_IMAGES = 16\n"
        "encode = indexer.Indexer._encode\n"
        "def slowly(self, model, batch): encode(self, model, batch); time.sleep(0.2)\n"
        "indexer.Indexer._encode = slowly\n"
        "from blip2_search.cli.app import main\n"
        "sys.argv = ['blip2-search', 'index', *sys.argv[1:]]\n"
        "main()\n"
    )
    command = [
        sys.executable, "-c", slow, str(photos), "--model", str(checkpoint), "--batch-size", "8",
    ]  # fmt: skip
    child = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    segments = tmp_path / "index" / "segments"
    deadline = time.monotonic() + 60
    while len(list(segments.glob("*.parquet"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL

    kept = json.loads(run("info", "--json").stdout)["images"]
    assert 16 <= kept < 138
    assert len(run("query", "a circle", "-k", 200, "--paths").stdout.splitlines()) == kept
    resumed = run("index", photos)
    assert f"{kept} unchanged" in resumed.stderr
    assert f"{138 - kept} added" in resumed.stderr
    assert json.loads(run("info", "--json").stdout)["images"] == 138


def test_errors_are_one_sentence_with_a_way_out(run, photos, checkpoint, tmp_path):
    missing = run("query", "a bar", code=1)
    assert missing.stdout == ""
    assert "blip2-search index" in missing.stderr
    run("index", tmp_path / "typo", code=1)
    run("index", photos, "--model", checkpoint)
    other = tmp_path / "other"
    save_model(build_tiny_model("other", seed=9), other)
    refused = run("query", "a bar", "--model", other, code=1)
    assert "--rebuild" in refused.stderr
    assert "no model" in run("index", photos, "--rebuild", "--model", "nonesuch", code=1).stderr


def test_texts_are_ranked_for_an_image(photos, run, checkpoint, tmp_path):
    labels = tmp_path / "labels.txt"
    labels.write_text("a red circle\n\na blue bar\n")
    photo = sorted(photos.iterdir())[0]
    ask = ("query", "--image", photo, "--texts", labels, "--model", checkpoint)
    found = hits(run(*ask, "--json"))
    assert {hit["text"] for hit in found} == {"a red circle", "a blue bar"}
    assert found[0]["score"] >= found[1]["score"]
    assert "a blue bar" in run(*ask, "-k", 2, "--rerank", 0).stdout
    run("query", "a bar", "--texts", labels, code=2)
    run(*ask, "--paths", code=2)
    labels.write_text("\n")
    run(*ask, code=2)


def test_few_images_are_searched_exactly_whatever_is_asked_for(photos, run, checkpoint, tmp_path):
    run("index", photos, "--model", checkpoint)
    exact = hits(run("query", "a red bar", "--json"))
    texts = tmp_path / "texts.txt"
    texts.write_text("a red bar\na circle\n")
    done = run("index", photos, "--kind", "compact", "--memory", "1MB", "--queries", texts)
    assert "nothing to measure" in done.stderr
    found = json.loads(run("info", "--json").stdout)
    assert (found["kind"], found["memory"], found["recall"]) == ("compact", 1_000_000, None)
    assert "exact, through" in run("info").stdout
    assert hits(run("query", "a red bar", "--json")) == exact
    assert " now" in run("compact").stderr
    run("index", photos, "--memory", "many", code=2)
    texts.write_bytes(b"\xff\xfe")
    run("index", photos, "--queries", texts, code=2)


def test_a_flipped_byte_is_found_and_mended(photos, run, checkpoint, tmp_path):
    run("index", photos, "--model", checkpoint)
    assert "18 images: all is whole" in run("verify").stderr
    (segment,) = (tmp_path / "index" / "segments").glob("*.parquet")
    state = json.loads((tmp_path / "index" / "manifest.json").read_text())["segments"][0]
    content = bytearray(segment.read_bytes())
    content[state["features_end"] - 1] ^= 1
    segment.write_bytes(content)
    found = run("verify", code=1)
    (path,) = found.stdout.splitlines()
    assert Path(path).parent == photos
    assert "1 image damaged: mend it with `blip2-search verify --repair`" in found.stderr
    mended = run("verify", "--repair")
    assert "1 image damaged, 1 encoded again" in mended.stderr
    assert mended.stdout.splitlines() == [path]
    assert len(hits(run("query", "a red bar", "-k", 50, "--json"))) == 18
    assert run("verify").stdout == ""
    for segment in (tmp_path / "index" / "segments").glob("*.parquet"):
        segment.unlink()
    assert "nobody can tell which" in run("verify", "--repair", code=1).stderr
    assert "18 added" in run("index", photos).stderr
