"""The store: what goes in comes out, after any change, any kill and for any name."""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from toy_store import MANIFEST, E, Q, content, features_of, record

from blip2_search.indexes import manifest as manifest_module
from blip2_search.indexes import segments as segments_module
from blip2_search.indexes import store as store_module
from blip2_search.indexes.errors import (
    StoreCorruptError,
    StoreError,
    StoreLockedError,
    StoreMissingError,
    StoreVersionError,
    VectorIndexError,
)
from blip2_search.indexes.exact import ExactIndex
from blip2_search.indexes.manifest import State, read_state, write_state
from blip2_search.indexes.store import Store, hash_file
from blip2_search.indexes.stored import StoredIndex


def add(store, *names):
    with store.writing():
        store.append([record(name) for name in names], features_of(*names))


def assert_holds(store, *names):
    """Look at the object, and at what a fresh reader finds."""
    for seen in (store, Store.open(store.directory)):
        assert len(seen) == len(names)
        assert seen.records == [record(name) for name in names]
        assert seen.features().tobytes() == features_of(*names).tobytes()
        assert seen.features().shape == (len(names), Q, E)
        assert len(seen.ids) == len(names)


def segment_files(store):
    return sorted((store.directory / "segments").iterdir())


@pytest.fixture
def store(tmp_path):
    return Store.create(tmp_path / "index", MANIFEST)


class TestRoundTrip:
    def test_an_empty_store(self, store):
        assert_holds(store)
        assert Store.open(store.directory).manifest == MANIFEST
        assert store.manifest.preprocessing["mean"] == [0.5, 0.5, 0.5]
        assert store.ids.dtype == np.int64

    def test_many_runs(self, store):
        add(store, "a", "b")
        add(store, "c")
        add(Store.open(store.directory), "d")
        assert_holds(Store.open(store.directory), "a", "b", "c", "d")

    def test_an_old_reader_keeps_its_view(self, store):
        add(store, "a")
        reader = Store.open(store.directory)
        add(store, "b")
        assert (len(reader), len(reader.records), len(reader.features())) == (1, 1, 1)

    def test_remove_and_add_again(self, store):
        add(store, "a", "b", "c", "d")
        with store.writing():
            assert store.remove(["/photos/b", "/photos/c", "/photos/unknown"]) == 2
            assert store.remove(["/photos/b"]) == 0
        assert_holds(store, "a", "d")
        with store.writing():
            assert store.remove(["/photos/a"]) == 1
        assert_holds(store, "d")
        add(store, "a")
        assert_holds(store, "d", "a")
        with store.writing():
            assert store.remove(["/photos/d"]) == 1
        add(store, "c", "e")
        assert_holds(store, "a", "c", "e")

    def test_remove_everything(self, store):
        add(store, "a", "b")
        add(store, "c")
        with store.writing():
            assert store.remove(Path(f"/photos/{name}") for name in "abc") == 3
            assert_holds(store)
            store.compact()
        assert_holds(store)
        assert segment_files(store) == []

    def test_an_id_is_never_used_again(self, store):
        add(store, "a", "b", "c")
        assert store.ids.tolist() == [0, 1, 2]
        with store.writing():
            store.remove(["/photos/c", "/photos/a"])
            store.compact()
        add(Store.open(store.directory), "c")
        with store.writing():
            assert store.ids.tolist() == [1, 3]
            store.remove(["/photos/b", "/photos/c"])
            store.compact()
        add(store, "d")
        assert Store.open(store.directory).ids.tolist() == [4]

    def test_names_of_all_kinds(self, store):
        raw = [
            b"caf\xe9 \xff.jpg",
            "čau 日本 🐈.png".encode(),
            b"a\nb\t'\".gif",
            b"e\xcc\x81",
            b" ",
        ]
        names = [os.fsdecode(name) for name in raw]
        add(store, *names[:2])
        add(store, *names[2:])
        assert_holds(store, *names)
        with store.writing():
            assert store.remove([f"/photos/{names[0]}"]) == 1
            store.compact()
        assert_holds(store, *names[1:])

    def test_extreme_records(self, store):
        extreme = [
            record("x", size=2**62, mtime_ns=-(2**62), width=2**31 - 1, height=1),
            record("y", size=0, mtime_ns=0),
        ]
        with store.writing():
            store.append(extreme, features_of("x", "y"))
        assert Store.open(store.directory).records == extreme

    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
    def test_features_of_every_float_type(self, store, dtype):
        with store.writing():
            store.append([record("a")], features_of("a").astype(dtype))
        assert_holds(store, "a")

    def test_features_of_every_layout(self, store):
        turned = features_of("a", "b").transpose(2, 1, 0).copy().transpose(2, 1, 0)
        assert not turned.flags.c_contiguous
        with store.writing():
            store.append([record("a"), record("b")], turned)
        assert_holds(store, "a", "b")

    def test_a_long_append_is_cut(self, store, monkeypatch):
        monkeypatch.setattr(store_module, "SEGMENT_ROWS", 4)
        names = [f"{i}.jpg" for i in range(10)]
        add(store, *names)
        assert len(segment_files(store)) == 3
        assert_holds(store, *names)
        assert store.ids.tolist() == list(range(10))

    def test_another_program_can_read_the_segments(self, store):
        add(store, "a", "b")
        table = pq.read_table(segment_files(store)[0])
        assert table.column("path").to_pylist() == [b"/photos/a", b"/photos/b"]
        value = table.column("features")[1].as_py()
        assert (np.frombuffer(value, "<f2").reshape(Q, E) == features_of("b")[0]).all()
        about = table.schema.field("features").metadata
        assert about == {b"dtype": b"float16, little-endian", b"shape": b"3 x 4"}


class TestCompact:
    def test_few_segments_and_nothing_dead(self, store):
        names = [f"{i}.jpg" for i in range(40)]
        for start in range(0, 40, 2):
            add(store, *names[start : start + 2])
        assert len(segment_files(store)) == 20
        before = store.size_on_disk()
        with store.writing():
            store.remove([f"/photos/{name}" for name in names[5:9]])
            store.compact()
        assert len(segment_files(store)) == len(read_state(store.directory).segments) <= 5
        assert not any(segment.removed for segment in read_state(store.directory).segments)
        assert store.size_on_disk() < before
        assert_holds(store, *names[:5], *names[9:])
        assert store.ids.tolist() == [*range(5), *range(9, 40)]

    def test_what_is_compact_is_left_alone(self, store):
        add(store, *[f"{i}.jpg" for i in range(20)])
        add(store, "a", "b")
        old = segment_files(store)
        with store.writing():
            store.compact()
        assert segment_files(store) == old

    def test_segments_stay_bounded(self, store, monkeypatch):
        monkeypatch.setattr(store_module, "SEGMENT_ROWS", 6)
        names = [f"{i}.jpg" for i in range(25)]
        for name in names:
            add(store, name)
        with store.writing():
            store.compact()
        rows = [segment.rows for segment in read_state(store.directory).segments]
        assert max(rows) <= 6
        assert len(rows) <= 8
        assert_holds(store, *names)

    def test_size_on_disk_is_that_of_the_files(self, store):
        add(store, "a", "b")
        files = [*segment_files(store), store.directory / "manifest.json"]
        assert store.size_on_disk() == sum(len(file.read_bytes()) for file in files)


class TestRefusals:
    def test_changes_need_the_lock(self, store):
        for change in (
            lambda: store.append([record("a")], features_of("a")),
            lambda: store.remove(["/photos/a"]),
            lambda: store.compact(),
        ):
            with pytest.raises(StoreError, match="writing"):
                change()
        assert_holds(store)

    def test_a_path_twice(self, store):
        add(store, "a")
        with store.writing():
            with pytest.raises(StoreError, match="/photos/a is in the index already"):
                store.append([record("b"), record("a")], features_of("b", "a"))
            with pytest.raises(StoreError, match="/photos/c is in the index already"):
                store.append([record("c"), record("c")], features_of("c", "c"))
        assert_holds(store, "a")

    @pytest.mark.parametrize(
        "features",
        [
            np.zeros((1, Q, E + 1), np.float16),
            np.zeros((2, Q, E), np.float16),
            np.zeros((Q, E), np.float16),
            np.zeros((1, Q, E), np.int32),
            np.full((1, Q, E), np.nan, np.float16),
            np.full((1, Q, E), 70_000, np.float32),  # more than float16 holds
        ],
    )
    def test_wrong_features(self, store, features):
        with store.writing(), pytest.raises(VectorIndexError):
            store.append([record("a")], features)
        assert_holds(store)

    @pytest.mark.parametrize(
        "changes", [{"path": "a.jpg"}, {"size": -1}, {"width": 0}, {"height": 0}]
    )
    def test_wrong_records(self, changes):
        with pytest.raises(ValueError, match="image"):
            record("a", **changes)

    @pytest.mark.parametrize(
        "changes", [{"dim": 0}, {"num_vectors": 0}, {"preprocessing": {"x": float("nan")}},
                    {"preprocessing": {"x": object()}}]
    )  # fmt: skip
    def test_wrong_manifests(self, changes):
        with pytest.raises(ValueError, match=r"at least 1|JSON"):
            dataclasses.replace(MANIFEST, **changes)

    def test_no_index(self, tmp_path):
        (tmp_path / "file").write_text("")
        for folder in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
            with pytest.raises(StoreMissingError, match=r"blip2-search index FOLDER --index .*"):
                Store.open(folder)
        assert sorted(tmp_path.iterdir()) == [tmp_path / "file"]

    def test_create_over_an_index(self, store):
        add(store, "a")
        with pytest.raises(StoreError, match="already"):
            Store.create(store.directory, MANIFEST)
        assert_holds(store, "a")

    def test_create_where_no_folder_can_be(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(StoreError, match="Cannot write"):
            Store.create(tmp_path / "file" / "index", MANIFEST)

    @pytest.mark.parametrize(("version", "help"), [(4, "upgrade"), (0, "--rebuild")])
    def test_another_schema_version(self, store, version, help):
        other = dataclasses.replace(MANIFEST, schema_version=version)
        write_state(store.directory, State(manifest=other))
        with pytest.raises(StoreVersionError, match=help):
            Store.open(store.directory)
        with pytest.raises(StoreVersionError):
            Store.create(store.directory.parent / "other", other)


class TestReplace:
    def test_another_model(self, store):
        add(store, "a", "b")
        other = dataclasses.replace(MANIFEST, model_name="other", dim=7)
        replaced = Store.create(store.directory, other, replace=True)
        assert (len(replaced), replaced.manifest) == (0, other)
        assert segment_files(store) == []
        assert Store.open(store.directory).features().shape == (0, Q, 7)

    def test_a_damaged_index(self, store):
        add(store, "a")
        (store.directory / "manifest.json").write_text("{")
        assert_holds(Store.create(store.directory, MANIFEST, replace=True))

    def test_somebody_elses_manifest(self, tmp_path):
        (tmp_path / "manifest.json").write_text("a web application's")
        with pytest.raises(StoreError, match="already"):
            Store.create(tmp_path, MANIFEST, replace=True)
        assert (tmp_path / "manifest.json").read_text() == "a web application's"

    def test_not_while_somebody_writes(self, store):
        with store.writing(), pytest.raises(StoreLockedError):
            Store.create(store.directory, MANIFEST, replace=True)


class TestLock:
    def test_a_second_writer_is_refused_at_once(self, store):
        other = Store.open(store.directory)
        with store.writing():
            with pytest.raises(StoreLockedError, match="Another process"), other.writing():
                pass
            with pytest.raises(StoreLockedError), store.writing():
                pass
            store.append([record("a")], features_of("a"))
        add(other, "b")
        assert_holds(other, "a", "b")

    def test_an_error_lets_go_of_it(self, store):
        with pytest.raises(KeyError), store.writing():
            raise KeyError
        add(store, "a")

    def test_another_process_holds_it_until_it_is_killed(self, store):
        code = (
            "import sys; from blip2_search.indexes.store import Store\n"
            "with Store.open(sys.argv[1]).writing():\n"
            "    print('held', flush=True); sys.stdin.read()"
        )
        child = subprocess.Popen(
            [sys.executable, "-c", code, str(store.directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        with child:
            assert child.stdout.readline() == b"held\n"
            with pytest.raises(StoreLockedError), store.writing():
                pass
            assert_holds(store)  # reading needs no lock
            child.kill()
        add(store, "a")
        assert_holds(store, "a")


DRIVER = '''
"""Does changes to copies of an index, each killed by SIGKILL at another step; prints what happened."""
import json, os, pathlib, shutil, signal, sys
from test_store import CHANGES
from blip2_search.indexes.store import Store

base, work = map(pathlib.Path, sys.argv[1:])

def deadly(module, name, fuse):
    """The function, which is preceded and followed by a step at which the process may die."""
    real = getattr(module, name)
    def function(*args, **kwargs):
        fuse.burn()
        done = real(*args, **kwargs)
        fuse.burn()
        return done
    setattr(module, name, function)

class Fuse:
    def __init__(self, steps):
        self.left = steps
    def burn(self):
        self.left -= 1
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

for change, do in CHANGES.items():
    for step in range(1000):
        folder = work / f"{change} {step}"
        shutil.copytree(base, folder)
        child = os.fork()
        if not child:
            fuse = Fuse(step)
            deadly(os, "fsync", fuse)
            deadly(os, "replace", fuse)
            deadly(pathlib.Path, "unlink", fuse)
            do(Store.open(folder))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
'''


def _append(store):
    add(store, "new", "newer")


def _remove(store):
    with store.writing():
        store.remove(["/photos/a", "/photos/d"])


def _compact(store):
    with store.writing():
        store.compact()


def _replace(store):
    Store.create(store.directory, MANIFEST, replace=True)


def _refresh(store):
    with store.writing():
        StoredIndex(store).refresh()


CHANGES = {
    "append": _append,
    "remove": _remove,
    "compact": _compact,
    "replace": _replace,
    "refresh": _refresh,
}
UNSEEN = {"compact", "refresh"}  # change nothing that a reader sees


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    store = Store.create(tmp_path_factory.mktemp("killed") / "base", MANIFEST)
    add(store, "a", "b")
    add(store, "c")
    add(store, "d", "e", "f")
    with store.writing():
        store.remove(["/photos/b"])
    return store.directory


@pytest.fixture(scope="module")
def work(base):
    work = base.parent / "work"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(base), str(work)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return work


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked children")
class TestKilled:
    """Each change, killed before and after each call that touches the disk's state."""

    @pytest.mark.parametrize("change", CHANGES)
    def test_all_or_nothing(self, base, work, change):
        folders = sorted(work.glob(f"{change} *"), key=lambda path: int(path.name.split()[1]))
        assert len(folders) >= 7  # at least a temporary file, a replacement and a folder; the end
        before = content(Store.open(base))
        after = content(Store.open(folders[-1]))
        states = [content(Store.open(folder)) for folder in folders]
        done = [state == after for state in states]
        assert all(state in (before, after) for state in states)
        assert done == sorted(done)  # once done, done for good
        assert done[0] == (change in UNSEEN)

    @pytest.mark.parametrize("change", CHANGES)
    def test_the_next_writer_goes_on(self, base, work, change, tmp_path):
        for number, killed in enumerate(work.glob(f"{change} *")):
            store = Store.open(shutil.copytree(killed, tmp_path / str(number)))
            before = content(store)
            old_ids = set(before[0])
            with store.writing():
                assert content(store) == before
                store.append([record("z")], features_of("z"))
                assert set(store.ids.tolist()) > old_ids
                store.compact()
                StoredIndex(store).refresh()
            assert store.records == [*before[1], record("z")]
            shortcuts = store.directory / "shortcuts"
            assert not list(shortcuts.glob("*.tmp"))
            assert len(list(shortcuts.glob("*-*.arrow"))) == len(segment_files(store))
            live = {segment.file for segment in read_state(store.directory).segments}
            assert {file.name for file in segment_files(store)} == live
            assert {file.name for file in store.directory.iterdir()} <= {
                "manifest.json",
                "segments",
                "shortcuts",
                "write.lock",
            }

    @pytest.mark.parametrize("change", CHANGES)
    def test_searches_find_what_is_there(self, work, change):
        queries = np.random.default_rng(0).standard_normal((5, E))
        for killed in work.glob(f"{change} *"):
            store = Store.open(killed)
            if len(store):
                found = StoredIndex(store).open().search(queries, 3)
                expected = ExactIndex(store.features()).search(queries, 3)
                assert found.images.tolist() == expected.images.tolist()

    def test_the_kills_left_something_to_sweep(self, work):
        """Else the tests above would be easy."""
        assert list(work.glob("append */manifest.json.*.tmp"))
        unnamed = [
            folder
            for folder in work.glob("append *")
            if len(segment_files(Store.open(folder))) > len(read_state(folder).segments)
        ]
        assert unnamed


class TestLeftovers:
    def test_are_ignored_and_swept(self, store):
        add(store, "a")
        half = store.directory / "segments" / f"{'0' * 32}.parquet"
        half.write_bytes(segment_files(store)[0].read_bytes()[:100])
        temporary = store.directory / "manifest.json.0123.tmp"
        temporary.write_text("{")
        foreign = store.directory / "segments" / "mine.parquet"
        foreign.write_text("not ours")
        assert_holds(store, "a")
        with store.writing():
            pass
        assert not half.exists()
        assert not temporary.exists()
        assert foreign.exists()
        assert_holds(store, "a")

    def test_ctrl_c_right_after_a_commit_loses_nothing(self, store, monkeypatch):
        def interrupted(directory, state):
            write_state(directory, state)
            raise KeyboardInterrupt

        with store.writing():
            store.append([record("a")], features_of("a"))
            with monkeypatch.context() as patch:
                patch.setattr(store_module, "write_state", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    store.append([record("b")], features_of("b"))
            store.append([record("c")], features_of("c"))
            store.compact()
        assert_holds(store, "a", "b", "c")
        assert store.ids.tolist() == [0, 1, 2]

    def test_a_full_disk_is_one_sentence_and_changes_nothing(self, store, monkeypatch):
        def full(descriptor):
            raise OSError(errno.ENOSPC, "No space left on device")

        add(store, "a")
        with store.writing():
            with monkeypatch.context() as patch:
                patch.setattr(os, "fsync", full)
                for change in (
                    lambda: store.append([record("b")], features_of("b")),
                    lambda: store.remove(["/photos/a"]),
                ):
                    with pytest.raises(StoreError, match="No space left on device"):
                        change()
            assert_holds(store, "a")
            store.append([record("b")], features_of("b"))
        assert_holds(store, "a", "b")


class TestDamage:
    def test_every_flipped_byte_of_a_segment_is_found(self, store):
        add(store, "a", "b")
        (file,) = segment_files(store)
        (segment,) = read_state(store.directory).segments
        good, expected = file.read_bytes(), Store.open(store.directory).records
        for position in range(0, len(good), 3):
            flipped = bytearray(good)
            flipped[position] ^= 1 << position % 8
            file.write_bytes(flipped)
            damaged = Store.open(store.directory)
            with pytest.raises(StoreCorruptError, match=file.name):
                damaged.features()
            if segment.features_start <= position < segment.features_end:
                assert damaged.records == expected  # reading them does not look at the features
            else:
                with pytest.raises(StoreCorruptError, match=file.name):
                    _ = damaged.records

    def test_a_segment_cut_short_or_gone(self, store):
        add(store, "a", "b")
        (file,) = segment_files(store)
        good = file.read_bytes()
        for length in (0, 1, 100, len(good) - 1):
            file.write_bytes(good[:length])
            for read in (Store.features, lambda store: store.records, lambda store: store.ids):
                with pytest.raises(StoreCorruptError, match=f"{file.name}.*bytes instead of"):
                    read(Store.open(store.directory))
        file.unlink()
        with pytest.raises(StoreCorruptError, match="is missing"):
            Store.open(store.directory).features()

    def test_a_merge_does_not_launder_damage(self, store):
        add(store, "a")
        add(store, "b")
        first = segment_files(store)[0]
        (segment,) = (s for s in read_state(store.directory).segments if s.file == first.name)
        flipped = bytearray(first.read_bytes())
        flipped[segment.features_end - 1] ^= 1
        first.write_bytes(flipped)
        with store.writing(), pytest.raises(StoreCorruptError, match=first.name):
            store.compact()

    def test_every_flipped_byte_of_the_manifest_is_found(self, store):
        add(store, "a", "b")
        file = store.directory / "manifest.json"
        good, expected = file.read_bytes(), read_state(store.directory)
        harmless = 0
        for position in range(len(good)):
            flipped = bytearray(good)
            flipped[position] ^= 1 << position % 8
            file.write_bytes(flipped)
            try:
                assert read_state(store.directory) == expected
                harmless += 1
            except StoreCorruptError as error:
                assert str(file) in str(error)  # noqa: PT017
        assert harmless < good.count(b" ") + good.count(b"\n")  # at most the white space

    @pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", "\xff", '{"checksum": 1}'])
    def test_no_manifest_at_all(self, store, text):
        (store.directory / "manifest.json").write_text(text, encoding="latin-1")
        with pytest.raises(StoreCorruptError, match=r"manifest\.json"):
            Store.open(store.directory)

    def test_a_well_signed_manifest_of_something_else(self, store):
        payload = {"manifest": {"schema_version": 1}, "segments": [], "next_id": 0}
        canonical = json.dumps(payload, sort_keys=True, separators=(",", ":")).encode()
        payload["checksum"] = hashlib.blake2b(canonical, digest_size=16).hexdigest()
        (store.directory / "manifest.json").write_text(json.dumps(payload))
        with pytest.raises(StoreCorruptError):
            Store.open(store.directory)

    def test_a_merge_under_a_reader_is_not_called_damage(self, store):
        add(store, "a")
        add(store, "b")
        reader = Store.open(store.directory)
        with store.writing():
            store.compact()
        with pytest.raises(StoreError, match="run the command again") as caught:
            reader.features()
        assert not isinstance(caught.value, StoreCorruptError)


class TestVerify:
    def test_a_whole_index(self, store):
        assert store.verify() == []
        add(store, "a", "b")
        with store.writing():
            store.remove(["/photos/a"])
            assert store.repair() == []
        assert store.verify() == []

    def test_every_flipped_byte_is_found_and_its_image_named(self, store):
        names = ["a", "b", "c", "d"]
        add(store, *names)
        with store.writing():
            store.remove(["/photos/b"])
        (file,) = segment_files(store)
        (segment,) = read_state(store.directory).segments
        good = file.read_bytes()
        named = set()
        for position in range(0, len(good), 2):
            flipped = bytearray(good)
            flipped[position] ^= 1 << position % 8
            file.write_bytes(flipped)
            found = Store.open(store.directory).verify()
            (damage,) = found  # a byte of b's features too, although b is dead: no reader takes it
            assert damage.file == file
            assert damage.images == (3 if damage.rows is None else len(damage.paths))
            inside = segment.features_start <= position < segment.features_end
            assert (damage.rows is None) == (not inside)
            named.add(damage.paths)
        # One image each, and all three where the page's own header is hit.
        singles = {(f"/photos/{name}",) for name in "acd"}
        assert singles <= named <= singles | {(), ("/photos/a", "/photos/c", "/photos/d")}
        assert () in named

    def test_repair_keeps_what_is_whole(self, store):
        add(store, "a", "b", "c")
        add(store, "d")
        (file,) = (
            f
            for f in segment_files(store)
            if f.name == read_state(store.directory).segments[0].file
        )
        segment = read_state(store.directory).segments[0]
        flipped = bytearray(file.read_bytes())
        flipped[segment.features_end - 2 * Q * E - 1] ^= 1  # the last byte of b's features
        file.write_bytes(flipped)
        with store.writing():
            (damage,) = store.repair()
        assert damage.paths == ("/photos/b",)
        assert_holds(store, "a", "c", "d")
        assert store.verify() == []
        assert store.ids.tolist() == [0, 2, 3]

    def test_repair_rewrites_a_segment_of_which_only_dead_rows_are_damaged(self, store):
        add(store, "a", "b")
        with store.writing():
            store.remove(["/photos/b"])
        (file,) = segment_files(store)
        (segment,) = read_state(store.directory).segments
        flipped = bytearray(file.read_bytes())
        flipped[segment.features_end - 1] ^= 1
        file.write_bytes(flipped)
        (damage,) = store.verify()
        assert (damage.images, damage.rows, damage.paths) == (0, (), ())
        with store.writing():
            store.repair()
        assert_holds(store, "a")
        assert store.verify() == []

    def test_a_merge_meanwhile_is_not_called_damage(self, store):
        add(store, "a")
        add(store, "b")
        reader = Store.open(store.directory)
        with store.writing():
            store.compact()
        with pytest.raises(StoreError, match="run the command again"):
            reader.verify()

    def test_repair_drops_a_file_that_is_lost(self, store):
        add(store, "a", "b")
        add(store, "c")
        first, _ = (s.file for s in read_state(store.directory).segments)
        (store.directory / "segments" / first).unlink()
        with store.writing():
            (damage,) = store.repair()
        assert (damage.rows, damage.paths, damage.images) == (None, (), 2)
        assert "missing" in damage.reason
        assert_holds(store, "c")

    def test_repair_needs_the_lock(self, store):
        with pytest.raises(StoreError, match="only within"):
            store.repair()


class TestOldVersions:
    """Version 1 had no checksum of each image; 1 and 2 had features in pages, and no settings."""

    @pytest.fixture(params=[1, 2])
    def version(self, request):
        return request.param

    @pytest.fixture
    def old(self, store, monkeypatch, version):
        whole = segments_module.make_table

        def make_table(*arguments):
            return whole(*arguments).drop_columns([segments_module.CHECKSUM])

        monkeypatch.setattr(segments_module, "_PAGE", 1)
        if version == 1:
            monkeypatch.setattr(store_module, "make_table", make_table)
        add(store, "a", "b")
        add(store, "c")
        monkeypatch.undo()
        content = json.loads((store.directory / "manifest.json").read_text())
        content["manifest"]["schema_version"] = version
        del content["settings"], content["checksum"]
        for segment in content["segments"]:
            del segment["features_at"]
        content["checksum"] = manifest_module._checksum(content)
        (store.directory / "manifest.json").write_text(json.dumps(content))
        return Store.open(store.directory)

    def test_it_is_read_and_grows(self, old):
        assert_holds(old, "a", "b", "c")
        assert old.verify() == []
        add(old, "d")
        with old.writing():
            old.remove(["/photos/b"])
            old.compact()
        assert_holds(old, "a", "c", "d")
        content = json.loads((old.directory / "manifest.json").read_text())
        assert content["manifest"]["schema_version"] == 3
        assert all("features_crc32" in pq.read_schema(file).names for file in segment_files(old))

    def test_it_is_searched(self, old):
        queries = np.random.default_rng(0).standard_normal((9, E))
        found = StoredIndex(old).open().search(queries, 2)
        expected = ExactIndex(features_of("a", "b", "c")).search(queries, 2)
        assert found.images.tolist() == expected.images.tolist()
        assert old.records_at(np.array([2, 0, 1, 2])) == [record(name) for name in "cabc"]

    @pytest.mark.parametrize("version", [1])
    def test_damage_names_the_whole_segment(self, old):
        segment = read_state(old.directory).segments[0]
        file = old.directory / "segments" / segment.file
        flipped = bytearray(file.read_bytes())
        flipped[segment.features_end - 1] ^= 1
        file.write_bytes(flipped)
        (damage,) = old.verify()
        assert damage.paths == ("/photos/a", "/photos/b")


def test_hash_file(tmp_path):
    file = tmp_path / "long"
    data = np.random.default_rng(0).bytes(3 * 2**20 + 17)
    file.write_bytes(data)
    assert hash_file(file) == hashlib.blake2b(data, digest_size=16).hexdigest()
    file.write_bytes(b"abc")
    assert hash_file(file) == "cf4ab791c62b8d2b2109c90275287816"
