"""A writer that is killed at any moment, a hundred times: the index is as before a change or after."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from toy_store import MANIFEST, features_of, record

from blip2_search.indexes.exact import ExactIndex
from blip2_search.indexes.store import Store
from blip2_search.indexes.stored import StoredIndex

KILLS = 100
QUERIES = np.random.default_rng(0).standard_normal((3, 4))


def write_for_ever(directory, seed, say):
    """Change the store at random; say before each change what it is, and after it that it is done."""
    rng = np.random.default_rng(seed)
    store = Store.open(directory)
    for number in range(10**6):
        names = [f"{seed}_{number}_{i}" for i in range(rng.integers(1, 5))]
        with store.writing():
            say("append", *(f"/photos/{name}" for name in names))
            store.append([record(name) for name in names], features_of(*names))
            say("done")
            paths = [one.path for one in store.records]
            gone = rng.choice(paths, min(len(paths), int(rng.integers(0, 5))), replace=False)
            say("remove", *gone)
            store.remove(gone)
            say("done")
            store.compact(float(rng.choice([0, 0.5])))
            StoredIndex(store).refresh()


def what_a_killed_writer_said(directory, seed, seconds):
    """Fork a writer, kill it so many seconds after its first word; return its whole lines."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        write_for_ever(
            directory, seed, lambda *words: os.write(writing, (" ".join(words) + "\n").encode())
        )
    os.close(writing)
    with open(reading) as stream:
        said = stream.read(1)
        threading.Timer(seconds, os.kill, [child, signal.SIGKILL]).start()
        said += stream.read()
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    return said[: said.rfind("\n") + 1].splitlines()


def after(paths, change):
    """Return the paths after a change."""
    verb, *named = change.split()
    return paths + named if verb == "append" else [path for path in paths if path not in named]


def kill_again_and_again(directory):
    """Kill writers, and look after each at what is there; print what was seen."""
    store = Store.create(directory, MANIFEST)
    rng = np.random.default_rng(1)
    paths, in_doubt, changes = [], 0, 0
    for kill in range(KILLS):
        lines = what_a_killed_writer_said(directory, kill, rng.uniform(0, 0.1))
        while len(lines) >= 2:
            change, done, *lines = lines
            assert done == "done"
            paths, changes = after(paths, change), changes + 1
        store = Store.open(directory)
        found = [one.path for one in store.records]
        if lines:  # killed within a change: it was made, or not
            in_doubt += 1
            assert found in (paths, after(paths, lines[0]))
            paths = found
        assert found == paths
        names = [Path(path).name for path in paths]
        assert store.features().tobytes() == features_of(*names).tobytes()
        assert store.verify() == []
        if paths:
            expected = ExactIndex(store.features()).search(QUERIES, 5)
            assert (
                StoredIndex(store).open().search(QUERIES, 5).images.tolist()
                == expected.images.tolist()
            )
    print(in_doubt, changes)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked children")
def test_a_hundred_kills(tmp_path):
    code = "import sys, test_random_kills as t; t.kill_again_and_again(sys.argv[1])"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "index"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    in_doubt, changes = map(int, done.stdout.split())
    assert in_doubt > KILLS // 20  # else the kills came at harmless moments only
    assert changes > KILLS
