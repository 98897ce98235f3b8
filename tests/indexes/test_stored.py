"""A store opened for searching: the same answers with shortcuts, without, and with damaged ones."""

from __future__ import annotations

import dataclasses
import errno

import numpy as np
import pytest
from toy_store import record

from blip2_search.indexes import recall as recall_module
from blip2_search.indexes import store as store_module
from blip2_search.indexes import stored as stored_module
from blip2_search.indexes.errors import StoreCorruptError, StoreError, VectorIndexError
from blip2_search.indexes.exact import ExactIndex
from blip2_search.indexes.joined import Joined
from blip2_search.indexes.manifest import Manifest, Settings
from blip2_search.indexes.store import Store
from blip2_search.indexes.stored import StoredIndex, check_memory

Q, E, RANK = 4, 32, 6


def photos(images, seed=0):
    """Features as a model makes them: alike within an image, few directions hold most of them."""
    rng = np.random.default_rng(seed)
    few = np.random.default_rng(99).standard_normal((RANK, E))
    x = rng.standard_normal((images, 1, RANK)) + 0.3 * rng.standard_normal((images, Q, RANK))
    x = x @ few + 0.1 * rng.standard_normal((images, Q, E))
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float16)


def queries_near(features, count=20):
    chosen = features[np.random.default_rng(1).integers(0, len(features), count), 0]
    return chosen.astype(np.float32) + 0.05 * np.random.default_rng(2).standard_normal((count, E))


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Return a store of 300 images in several segments, a few rows removed from two of them."""
    monkeypatch.setattr(store_module, "SEGMENT_ROWS", 100)
    manifest = Manifest(
        model_name="toy", model_fingerprint="f00d", preprocessing={}, num_vectors=Q, dim=E
    )
    store = Store.create(tmp_path / "index", manifest)
    with store.writing():
        store.append([record(str(i)) for i in range(310)], photos(310))
        store.remove([f"/photos/{i}" for i in (0, 3, 99, 100, 101, 150, 151, 152, 198, 199)])
    return store


def shortcut_files(store):
    return sorted((store.directory / "shortcuts").glob("*-*.arrow"))


def refresh(store):
    with store.writing():
        StoredIndex(store).refresh()


def change_settings(store, **changes):
    with store.writing():
        store.change_settings(dataclasses.replace(store.settings, **changes))


def assert_answers_as_the_oracle(store, k=12):
    features = store.features()
    queries = queries_near(features)
    found = StoredIndex(store).open().search(queries, k)
    expected = ExactIndex(features).search(queries, k)
    assert found.images.tolist() == expected.images.tolist()
    assert found.scores.tobytes() == expected.scores.tobytes()
    paths = [one.path for one in store.records]
    images = found.images[0]
    assert [one.path for one in store.records_at(images)] == [paths[image] for image in images]


def test_with_and_without_shortcuts(store):
    assert len(store.segments) == 4
    assert_answers_as_the_oracle(store)
    refresh(store)
    assert len(shortcut_files(store)) == 4
    assert_answers_as_the_oracle(store)
    shortcut_files(store)[1].unlink()
    assert_answers_as_the_oracle(Store.open(store.directory))


def test_features_and_bounds_are_mapped_not_read(store):
    refresh(store)
    index = StoredIndex(store).open()
    for joined in (index._features, index._bounds):
        assert all(not part.flags.owndata and not part.flags.writeable for part in joined.parts)


def test_shortcuts_follow_the_segments(store):
    refresh(store)
    before = set(shortcut_files(store))
    with store.writing():
        store.append([record("new")], photos(1, seed=5))
        StoredIndex(store).refresh()
    assert len(set(shortcut_files(store)) - before) == 1
    with store.writing():
        store.compact()
        StoredIndex(store).refresh()
    assert len(shortcut_files(store)) == len(store.segments)
    assert_answers_as_the_oracle(store)


def test_new_directions_when_it_has_grown_much(store):
    refresh(store)
    before = set(shortcut_files(store))
    with store.writing():
        store.append([record(f"more {i}") for i in range(1000)], photos(1000, seed=3))
        StoredIndex(store).refresh()
    assert not before & set(shortcut_files(store))
    assert_answers_as_the_oracle(store)


def spoilt(content, how):
    """Return a file's bytes, spoilt."""
    if how == "truncated":
        return content[:-100]
    if how == "flipped":
        middle = len(content) // 2
        return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    return {"empty": b"", "garbage": b"ARROW1" + bytes(300)}[how]


@pytest.mark.parametrize("how", ["truncated", "empty", "garbage"])
@pytest.mark.parametrize("name", ["directions.arrow", "*-*.arrow"])
def test_what_is_spoilt_is_named_and_made_anew(store, name, how):
    refresh(store)
    file = sorted((store.directory / "shortcuts").glob(name))[0]
    file.write_bytes(spoilt(file.read_bytes(), how))
    assert_answers_as_the_oracle(store)
    assert [damage.file for damage in StoredIndex(store).damaged()] == [file]
    refresh(store)
    assert StoredIndex(store).damaged() == []
    assert len(shortcut_files(store)) == len(store.segments)


@pytest.mark.parametrize("name", ["directions.arrow", "*-*.arrow"])
def test_a_flipped_byte_is_named(store, name):
    refresh(store)
    assert StoredIndex(store).damaged() == []
    file = sorted((store.directory / "shortcuts").glob(name))[0]
    file.write_bytes(spoilt(file.read_bytes(), "flipped"))
    assert [damage.file for damage in StoredIndex(store).damaged()] == [file]


def test_every_flip_in_the_directions_is_noticed(store):
    refresh(store)
    file = store.directory / "shortcuts" / "directions.arrow"
    whole = file.read_bytes()
    key = StoredIndex(store).directions.key
    for place in range(0, len(whole), 7):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        found = StoredIndex(store).directions
        assert found is None or found.key == key  # padding


def test_a_shortcut_of_another_shape_is_made_anew(store):
    refresh(store)
    one, other = sorted(shortcut_files(store), key=lambda file: file.stat().st_size)[::3]
    one.write_bytes(other.read_bytes())
    assert_answers_as_the_oracle(store)
    assert [damage.file for damage in StoredIndex(store).damaged()] == [one]


def test_another_model_takes_nothing_over(store):
    refresh(store)
    change_settings(store, kind="compact")
    StoredIndex(store).measure(queries_near(store.features()))
    manifest = dataclasses.replace(store.manifest, model_fingerprint="beef")
    for one, recall in ((manifest, False), (store.manifest, False)):
        new = Store.create(store.directory, one, settings=store.settings, replace=True)
        with new.writing():
            new.append([record(str(i)) for i in range(310)], photos(310, seed=8))
        if one is manifest:
            assert StoredIndex(new).directions is None
        assert (store.directory / "shortcuts" / "recall.json").exists() is recall
        refresh(new)
        assert_answers_as_the_oracle(new)


def test_an_emptied_store_keeps_nothing(store):
    refresh(store)
    with store.writing():
        store.remove([one.path for one in store.records])
        StoredIndex(store).refresh()
    assert shortcut_files(store) == []


def test_a_full_disk_is_one_sentence(store, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stored_module, "write_shortcut", full)
    with pytest.raises(StoreError, match="No space left on device"):
        refresh(store)
    monkeypatch.undo()
    assert_answers_as_the_oracle(store)


def test_features_that_are_no_numbers_are_an_error(store):
    segment = store.segments[0]
    file = store.directory / "segments" / segment.file
    content = bytearray(file.read_bytes())
    second = segment.features_at + 2 * Q * E  # row 0 is removed
    content[second : second + 2] = b"\x00\x7e"  # NaN
    file.write_bytes(content)
    with pytest.raises(StoreCorruptError, match="verify --repair"):
        StoredIndex(store).open()


class TestCompact:
    @pytest.fixture(autouse=True)
    def small(self, monkeypatch):
        monkeypatch.setattr(stored_module, "_WORTHWHILE", 16)

    def test_is_measured_and_finds_what_it_says(self, store, monkeypatch):
        monkeypatch.setattr(recall_module, "FEWEST", 8)
        monkeypatch.setattr(recall_module, "DEPTH", 16)
        monkeypatch.setattr("blip2_search.indexes.bounded.DEPTH", 16)
        refresh(store)
        assert not StoredIndex(store).needs_measuring
        change_settings(store, kind="compact")
        assert StoredIndex(store).needs_measuring
        assert (
            StoredIndex(store).open().candidates is None
        )  # exact, until it is known what is missed
        queries = queries_near(store.features(), 50)
        measured = StoredIndex(store).measure(queries)
        assert not StoredIndex(store).needs_measuring
        assert StoredIndex(store).measured == measured
        assert measured.recall_at_128 >= 0.999
        index = StoredIndex(store).open()
        assert index.candidates == measured.candidates < len(store)
        assert (
            index.nbytes
            == StoredIndex(store).search_bytes
            == 4 * len(store) * len(index.directions)
        )
        found = index.search(queries, 16).images
        exact = ExactIndex(store.features()).search(queries, 16).images
        shared = [
            len(set(a) & set(b)) / 16 for a, b in zip(found.tolist(), exact.tolist(), strict=True)
        ]
        assert np.mean(shared) == pytest.approx(measured.recall_at_128)

    def test_what_it_finds_is_scored_exactly(self, store):
        refresh(store)
        queries = queries_near(store.features())
        found = StoredIndex(store).open().compact(40).search(queries, 10)
        everything = ExactIndex(store.features()).search(queries, len(store))
        for row in range(len(queries)):
            scores = dict(zip(everything.images[row], everything.scores[row], strict=True))
            assert [scores[image] for image in found.images[row]] == found.scores[row].tolist()

    def test_more_results_than_candidates(self, store):
        found = StoredIndex(store).open().compact(5).search(queries_near(store.features()), 290)
        assert found.images.shape == (20, 290)
        assert all(len(set(row)) == 290 for row in found.images.tolist())

    def test_stays_exact_where_the_target_is_missed(self, store, monkeypatch):
        monkeypatch.setattr(recall_module, "FEWEST", 1)
        monkeypatch.setattr(recall_module, "_MOST", 1)
        monkeypatch.setattr(recall_module, "DEPTH", 200)
        monkeypatch.setattr(recall_module, "TARGET", 1.1)
        refresh(store)
        change_settings(store, kind="compact")
        measured = StoredIndex(store).measure(queries_near(store.features()))
        assert measured.candidates is None
        assert not StoredIndex(store).needs_measuring
        assert StoredIndex(store).open().candidates is None
        assert_answers_as_the_oracle(store)

    def test_auto_is_exact_where_the_bounds_fit_into_memory(self, store):
        refresh(store)
        exact = StoredIndex(store).search_bytes
        assert exact == 4 * len(store) * Q * (len(StoredIndex(store).open().directions) + 1)
        change_settings(store, memory=exact)
        assert not StoredIndex(store).needs_measuring
        change_settings(store, memory=exact - 1)
        assert StoredIndex(store).needs_measuring

    def test_memory_cuts_the_directions_of_the_means(self, store):
        refresh(store)
        change_settings(store, kind="compact", memory=4 * 8 * len(store) + 100)
        measured = StoredIndex(store).measure(queries_near(store.features()))
        assert measured.mean_directions == 8 < len(StoredIndex(store).open().directions)
        assert StoredIndex(store).search_bytes <= store.settings.memory
        settings = dataclasses.replace(store.settings, memory=4 * 8 * len(store) - 1)
        with pytest.raises(VectorIndexError, match="at least 9,600 bytes"):
            check_memory(settings, len(store), E)
        check_memory(dataclasses.replace(settings, kind="exact"), len(store), E)

    def test_is_measured_again_when_it_has_grown(self, store):
        refresh(store)
        change_settings(store, kind="compact")
        StoredIndex(store).measure(queries_near(store.features()))
        for added, needed in ((100, False), (100, True)):
            with store.writing():
                first = len(store)
                names = [record(f"later {first + i}") for i in range(added)]
                store.append(names, photos(added, seed=first))
                StoredIndex(store).refresh()
            assert StoredIndex(store).needs_measuring is needed

    def test_settings_outlive_changes(self, store):
        change_settings(store, kind="compact", memory=10**9)
        with store.writing():
            store.append([record("new")], photos(1, seed=5))
            store.compact()
        assert Store.open(store.directory).settings == Settings(kind="compact", memory=10**9)
        with pytest.raises(ValueError, match="kind is one of"):
            Settings(kind="fast")


def test_joined_takes_live_rows_by_number():
    parts = [np.arange(10).reshape(5, 2), np.arange(100, 106).reshape(3, 2)]
    joined = Joined(parts, [np.array([1, 4]), None])
    assert joined.shape == (5, 2)
    assert joined[np.array([4, 0, 1, 2])].tolist() == [[104, 105], [2, 3], [8, 9], [100, 101]]
    assert joined[np.array([], np.int64)].shape == (0, 2)
    assert [(images, part.tolist()) for images, part, _ in joined.by_part()] == [
        (slice(0, 2), parts[0].tolist()),
        (slice(2, 5), parts[1].tolist()),
    ]


def test_few_removed_rows_are_tolerated(store):
    files = [segment.file for segment in store.segments]
    with store.writing():
        store.compact(0.2)
        assert [segment.file for segment in store.segments] == files
        store.compact()
    assert not any(segment.removed for segment in store.segments)


def test_nothing_to_do_for_an_empty_store(tmp_path):
    manifest = Manifest(
        model_name="toy", model_fingerprint="f00d", preprocessing={}, num_vectors=Q, dim=E
    )
    store = Store.create(tmp_path / "index", manifest)
    refresh(store)
    assert not (store.directory / "shortcuts").exists()
    assert not StoredIndex(store).needs_measuring
    assert StoredIndex(store).damaged() == []
