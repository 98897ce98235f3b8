"""`blip2-search query`: what reaches the engine, and what reaches stdout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from blip2_search.cli import render
from blip2_search.retrieval.engine import Hit
from blip2_search.retrieval.errors import ImageReadError

BYTES = b"/photos/caf\xe9 [b].jpg"  # Latin-1: no UTF-8
ODD = os.fsdecode(BYTES)


@pytest.fixture
def engine(engine):
    engine.hits = [
        Hit(rank=1, path="/photos/dog.jpg", score=3.5, itc=0.5, itm=3.0),
        Hit(rank=2, path=ODD, score=1.25, itc=0.25, itm=1.0),
        Hit(rank=3, path="/photos/a\nb.jpg", score=0.125, itc=0.125, itm=None),
    ]
    return engine


def test_the_table_is_for_people(run, engine):
    done = run("query", "a dog")
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["#", "path", "score", "ITC", "ITM"]
    assert lines[2].split() == ["1", "/photos/dog.jpg", "3.500", "0.500", "3.000"]
    assert "caf\\udce9 [b].jpg" in lines[3]
    assert lines[4].split() == ["3", "/photos/a\\nb.jpg", "0.125", "0.125", "-"]
    assert done.stderr == ""


def test_json_is_one_object_a_line(run, engine):
    done = run("query", "a dog", "--json")
    objects = [json.loads(line) for line in done.stdout.splitlines()]
    assert objects[0] == {
        "rank": 1, "path": "/photos/dog.jpg", "score": 3.5, "itc": 0.5, "itm": 3.0,
    }  # fmt: skip
    assert os.fsencode(objects[1]["path"]) == BYTES
    assert objects[2]["itm"] is None
    assert done.stdout.isascii()
    assert done.stderr == ""


def test_paths_are_byte_for_byte(run, engine):
    done = run("query", "a dog", "--paths", "-k", 2)
    assert done.stdout_bytes == b"/photos/dog.jpg\n" + BYTES + b"\n"


def test_null_ends_paths_for_xargs(run, engine):
    done = run("query", "a dog", "-0")
    assert done.stdout_bytes == b"/photos/dog.jpg\0" + BYTES + b"\0/photos/a\nb.jpg\0"


def test_options_reach_the_engine(run, engine, tmp_path):
    run(
        "query", " a dog ", "--index", tmp_path, "-k", 3, "--rerank", 0,
        "--device", "cpu", "--backend", "torch", "--model", "m",
    )  # fmt: skip
    assert engine.opened == [{"index": tmp_path, "model": "m", "device": "cpu", "backend": "torch"}]
    assert engine.calls == [("a dog", {"k": 3, "rerank": 0})]


def test_the_index_is_that_of_the_user_unless_named(run, engine, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", "/home/ada/data")
    run("query", "a dog")
    run("query", "a dog", env={"BLIP2_SEARCH_INDEX": "/elsewhere"})
    run("query", "a dog", "--index", "here", env={"BLIP2_SEARCH_INDEX": "/elsewhere"})
    default, by_variable, by_option = (opened["index"] for opened in engine.opened)
    if sys.platform == "linux":
        assert default == Path("/home/ada/data/blip2-search/index")
    assert default.parts[-2:] == ("blip2-search", "index")
    assert (by_variable, by_option) == (Path("/elsewhere"), Path("here"))


def test_an_image_reaches_the_engine_as_a_path(run, engine, tmp_path):
    file = tmp_path / "query.png"
    file.touch()
    run("query", "--image", file)
    assert engine.calls == [(file, {"k": 10, "rerank": None})]
    engine.error = ImageReadError("not an image", str(file))
    assert run("query", "--image", file, code=1).stderr == f"error: {file}: not an image\n"


def test_a_text_that_is_the_name_of_a_file_is_a_text(run, engine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("dog").touch()
    run("query", "dog")
    assert engine.calls[0][0] == "dog"
    assert isinstance(engine.calls[0][0], str)


def test_a_dash_reads_a_line(run, engine):
    run("query", "-", input="a dog\nmore\n")
    assert engine.calls[0][0] == "a dog"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "either a text or --image"),
        (["a dog", "--image", __file__], "either a text or --image"),
        (["--image", "/no/such/file.png"], "does not exist"),
        ([" "], "empty"),
        (["-"], "empty"),
        (["a dog", "--json", "--paths"], "excludes --paths"),
        (["a dog", "--json", "-0"], "excludes --paths"),
    ],
)
def test_contradictions_are_wrong_usage(run, engine, arguments, complaint):
    done = run("query", *arguments, code=2)
    assert complaint in " ".join(done.stderr.split())
    assert (done.stdout, engine.calls) == ("", [])


def test_nothing_readable_is_an_error(run, engine):
    engine.hits = []
    done = run("query", "a dog", "--json", code=1)
    assert done.stdout == ""
    assert "blip2-search index" in done.stderr


def test_a_path_is_shown_as_short_as_it_can_be(monkeypatch, tmp_path):
    home, work = tmp_path / "ada", tmp_path / "ada" / "work"
    work.mkdir(parents=True)
    monkeypatch.chdir(work)
    monkeypatch.setattr(Path, "home", lambda: home)
    assert render.short_path(str(work / "a.jpg")) == "a.jpg"
    assert render.short_path(str(home / "a.jpg")) == os.path.join("~", "a.jpg")
    assert render.short_path("/a.jpg") == "/a.jpg"


def test_a_terminal_that_knows_few_characters_shows_escapes():
    code = (
        "from blip2_search.retrieval import engine\n"
        "hit = engine.Hit(rank=1, path='/\\u5e83\\u5834.jpg', score=1.0, itc=1.0, itm=None)\n"
        "class Fake:\n"
        "    def __init__(self, *_, **__): pass\n"
        "    def search(self, *_, **__): return [hit]\n"
        "engine.SearchEngine = Fake\n"
        "from blip2_search.cli.app import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "query", "a square"],
        capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"/\\u5e83\\u5834.jpg" in done.stdout
