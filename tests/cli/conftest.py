"""The program in this process, on a fake engine behind the real interface."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import pytest
from typer.testing import CliRunner

from blip2_search.cli import options
from blip2_search.cli.app import app
from blip2_search.retrieval import engine as engine_module
from blip2_search.retrieval.engine import Hit, IndexInfo, IndexReport


@dataclass
class FakeEngine:
    """Answers as told, and remembers what it was asked."""

    hits: list[Hit] = field(default_factory=list)
    report: IndexReport | None = None
    error: BaseException | None = None
    progress: list[tuple[int, int]] = field(default_factory=list)
    opened: list[dict[str, Any]] = field(default_factory=list)
    calls: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)

    def open(self, index_path, model=None, *, device="auto", backend="auto"):
        self.opened.append(
            {"index": index_path, "model": model, "device": device, "backend": backend}
        )
        return self

    def search(self, query, k=10, rerank=None):
        self._called(query, k=k, rerank=rerank)
        return self.hits[:k]

    def add(self, paths, *, on_progress=None, **how):
        self._called(paths, **how)
        for done, total in self.progress:
            on_progress(done, total)
        return self.report or make_report(added=len(paths), total=len(paths))

    def info(self):
        self._called(None)
        return IndexInfo(
            path="/data/index", images=1234, vectors_per_image=32, embedding_size=256,
            model_name="mini", model_fingerprint="0123abcd", schema_version=1,
            size_on_disk=20_500_000, kind="auto", memory=2_000_000_000,
            search_bytes=12_000_000, recall=None, needs_measuring=False, rerank_features="int8",
            preprocessing={"image_size": 260, "resize": "squash, bicubic"},
        )  # fmt: skip

    def _called(self, what, **how):
        self.calls.append((what, how))
        if self.error is not None:
            raise self.error


def make_report(**changes) -> IndexReport:
    empty = {
        "added": 0, "updated": 0, "reused": 0, "unchanged": 0, "removed": 0, "skipped": (), "total": 0,
        "seconds": 1.5, "interrupted": False,
    }  # fmt: skip
    return IndexReport(**{**empty, **changes})


@pytest.fixture(name="make_report")
def make_report_fixture():
    return make_report


@pytest.fixture(autouse=True)
def calm(monkeypatch):
    """Keep the tester's own index, and the logging of this process, out of the tests."""
    monkeypatch.delenv(options.INDEX_VARIABLE, raising=False)
    log = logging.getLogger("blip2_search")
    handlers, level = log.handlers[:], log.level
    yield
    log.handlers[:] = handlers
    log.setLevel(level)


@pytest.fixture
def engine(monkeypatch) -> FakeEngine:
    fake = FakeEngine()
    monkeypatch.setattr(engine_module, "SearchEngine", fake.open)
    return fake


@pytest.fixture
def run():
    """Run the program in this process; check its exit code."""

    def run(*arguments, code=0, input=None, env=None):
        done = CliRunner().invoke(app, [str(argument) for argument in arguments], input, env)
        assert done.exit_code == code, (done.stderr, done.exception)
        return done

    return run
