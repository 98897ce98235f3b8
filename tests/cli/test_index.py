"""`blip2-search index`: sources, summary, exit codes, progress."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from blip2_search.cli import progress
from blip2_search.retrieval.engine import SkippedFile


def test_options_reach_the_engine(run, engine, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("a dog\n\n  a cat \n")
    run(
        "index", "a", "b.jpg", "--index", tmp_path, "--model", "m", "--batch-size", 4,
        "--workers", 3, "--device", "cpu", "--backend", "torch", "--rebuild", "--kind", "compact", "--memory", "3MB",
        "--queries", texts, "--rerank-features", "fp16",
    )  # fmt: skip
    assert engine.opened == [{"index": tmp_path, "model": "m", "device": "cpu", "backend": "torch"}]
    how = {
        "batch_size": 4, "workers": 3, "rebuild": True,
        "kind": "compact", "memory": 3_000_000, "queries": ["a dog", "a cat"],
        "rerank_features": "fp16",
    }  # fmt: skip
    assert engine.calls == [([Path("a"), Path("b.jpg")], how)]


def test_the_summary_counts_everything_and_names_the_next_command(run, engine, make_report):
    engine.report = make_report(
        added=1200, updated=3, unchanged=45, removed=2, total=1248,
        skipped=(SkippedFile("/photos/broken.jpg", "image file is truncated"),),
    )  # fmt: skip
    done = run("index", "photos", "--index", "my index")
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "1,200 added, 3 updated, 45 unchanged, 2 removed, 1 skipped in 1.5 s",
        "  skipped /photos/broken.jpg: image file is truncated",
        "1,248 images in the index my index",
        "Next: blip2-search query \"a clock tower\" --index 'my index'",
    ]


def test_an_index_that_query_finds_by_itself_is_not_named_again(run, engine):
    assert run("index", "photos").stderr.endswith('query "a clock tower"\n')
    found = run("index", "photos", env={"BLIP2_SEARCH_INDEX": "/elsewhere"})
    assert found.stderr.endswith('query "a clock tower"\n')


def test_ten_skipped_files_are_listed_and_all_with_verbose(run, engine, make_report):
    skipped = tuple(SkippedFile(f"/{i}.jpg", "no image") for i in range(13))
    engine.report = make_report(added=1, total=1, skipped=skipped)
    short = run("index", "photos").stderr
    assert "/9.jpg" in short
    assert "/10.jpg" not in short
    assert "and 3 more" in short
    long = run("index", "photos", "--verbose").stderr
    assert "/12.jpg" in long
    assert "more" not in long


def test_interrupted_says_what_is_kept(run, engine, make_report):
    engine.report = make_report(added=5, total=5, interrupted=True)
    done = run("index", "photos", code=130)
    assert "5 images in the index" in done.stderr
    assert "the same command goes on" in done.stderr
    assert "Next:" not in done.stderr
    assert "without --rebuild" in run("index", "photos", "--rebuild", code=130).stderr


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({}, 1),
        ({"skipped": (SkippedFile("/a.jpg", "no image"),), "total": 7}, 1),
        ({"skipped": (SkippedFile("/a.jpg", "no image"),), "added": 1, "total": 1}, 0),
        ({"unchanged": 3, "total": 3}, 0),
        ({"removed": 3}, 0),
    ],
)
def test_only_nothing_at_all_is_an_error(run, engine, make_report, changes, code):
    engine.report = make_report(**changes)
    assert ("nothing could be indexed" in run("index", "photos", code=code).stderr) == bool(code)


@pytest.mark.parametrize("end", [b"\n", b"\0"])
def test_a_dash_reads_paths_byte_for_byte(run, engine, end):
    names = [b"a b.jpg", b"caf\xe9.jpg"]
    run("index", "c", "-", input=b"".join(name + end for name in names))
    assert engine.calls[0][0] == [Path("c"), *(Path(os.fsdecode(name)) for name in names)]


def test_an_empty_stdin_is_wrong_usage(run, engine):
    assert "no paths on stdin" in run("index", "-", input=b"\n", code=2).stderr
    assert not engine.calls


def test_odd_names_do_not_break_the_summary(run, engine, make_report):
    skipped = (SkippedFile("/caf\udce9\x1b[31m.jpg", "no image"),)
    engine.report = make_report(added=1, total=1, skipped=skipped)
    assert "/caf\\udce9\\x1b[31m.jpg: no image" in run("index", "photos").stderr


def test_without_a_terminal_progress_is_a_line_now_and_then(monkeypatch, capsys):
    clock = iter([0.0, 0.0, 1.0, 1.0, 12.0, 12.0, 12.0, 13.0, 13.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(progress.Rate.__init__, "__defaults__", (progress.time.monotonic,))
    with progress.encoding_progress() as update:
        next(clock)
        update(0, 100)
        update(44, 100)
        update(60, 100)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "44 of 100 images, 4.0 images/s, 14.0 s left\n"


def test_in_a_terminal_progress_is_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    with progress.encoding_progress() as update:
        for done in range(0, 1201, 400):
            update(done, 1200)
    assert "1,200 of 1,200" in screen.getvalue()
    assert "images/s" in screen.getvalue()


def test_the_rate_leaves_out_the_time_before_the_first_file():
    times = iter([100.0, 102.0, 104.0])
    rate = progress.Rate(lambda: next(times))
    assert rate(10) == 0.0
    assert rate(50) == 20.0
    assert rate(90) == 20.0
