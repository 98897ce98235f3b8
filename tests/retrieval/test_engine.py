"""The search engine on drawn photographs, against the model asked by hand."""

import dataclasses
import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from blip2_search.indexes import recall, stored
from blip2_search.indexes.errors import (
    ModelMismatchError,
    StoreCorruptError,
    StoreMissingError,
    VectorIndexError,
)
from blip2_search.indexes.manifest import read_state
from blip2_search.indexes.store import Store
from blip2_search.retrieval import indexer
from blip2_search.retrieval.checkpoints import save_model
from blip2_search.retrieval.engine import SearchEngine
from blip2_search.retrieval.errors import DeviceMemoryError, ImageReadError
from blip2_search.retrieval.prompts import PROMPTS
from tiny import build_tiny_model, draw


@pytest.fixture
def engine(photos, tmp_path, tiny_model):
    engine = SearchEngine(tmp_path / "index", tiny_model)
    engine.add([photos], rerank_features="none")
    return engine


def by_hand(model, photos, text):
    """Score every photograph with the model alone: (path, ITC, ITM) of each."""
    paths = sorted(photos.iterdir())
    features = model.encode_images(paths).astype(np.float16).astype(np.float32)
    itc = (features @ model.encode_texts([text])[0]).max(axis=1)
    itm = model.match(model.image_tokens(paths), [text] * len(paths))
    return [(str(p), a, b) for p, a, b in zip(paths, itc, itm, strict=True)]


def test_itc_alone_is_max_over_queries(engine, photos, tiny_model):
    expected = sorted(by_hand(tiny_model, photos, "a red circle"), key=lambda row: -row[1])
    hits = engine.search("a red circle", k=18, rerank=0)
    assert [hit.path for hit in hits] == [row[0] for row in expected]
    assert np.allclose([hit.score for hit in hits], [row[1] for row in expected], atol=1e-5)
    assert [hit.rank for hit in hits] == list(range(1, 19))
    assert all(hit.itm is None and hit.score == hit.itc for hit in hits)


def test_rerank_adds_the_itm_logit(engine, photos, tiny_model):
    rows = sorted(by_hand(tiny_model, photos, "a red circle"), key=lambda row: -row[1])
    candidates = sorted(rows[:6], key=lambda row: -(row[1] + row[2]))
    hits = engine.search("a red circle", k=3, rerank=6)
    assert [hit.path for hit in hits] == [row[0] for row in candidates[:3]]
    for hit, (_, itc, itm) in zip(hits, candidates, strict=False):
        assert hit.itm == pytest.approx(itm, abs=1e-4)
        assert hit.score == pytest.approx(itc + itm, abs=1e-4)
    # k is reranked at least, however small the rerank is, and no more hits come than images
    assert all(hit.itm is not None for hit in engine.search("a bar", k=50, rerank=1))
    assert len(engine.search("a bar", k=50)) == 18


def test_an_image_finds_itself(engine, photos):
    path = photos / "blue bar.png"
    assert engine.search(path, k=1)[0].path == str(path)
    with Image.open(path) as image:
        (hit,) = engine.search(image, k=1)
    assert (hit.path, hit.itm) == (str(path), None)
    assert hit.itc == pytest.approx(1, abs=1e-2)


def test_a_second_run_does_only_what_changed(engine, photos):
    again = engine.add([photos])
    assert (again.added, again.updated, again.unchanged, again.removed) == (0, 0, 18, 0)
    draw("orange", "circle").save(photos / "red bar.png")
    os.utime(photos / "red bar.png", ns=(1, 1))
    draw("gold", "square").save(photos / "new.png")
    (photos / "green bar.png").unlink()
    report = engine.add([photos])
    assert (report.added, report.updated, report.unchanged, report.removed) == (1, 1, 16, 1)
    assert report.total == engine.info().images == 18
    hits = engine.search(photos / "new.png", k=18)
    assert hits[0].path == str(photos / "new.png")
    assert str(photos / "green bar.png") not in [hit.path for hit in hits]


def test_other_folders_are_left_alone(engine, photos, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    draw("red", "bar").save(other / "x.png")
    (photos / "red bar.png").unlink()
    report = engine.add([other])
    assert (report.added, report.removed, report.total) == (1, 0, 19)
    shutil.rmtree(photos)
    assert engine.add([photos]).removed == 18


def test_unreadable_files_are_skipped_with_the_reason(engine, photos):
    whole = (photos / "red bar.png").read_bytes()
    (photos / "cut.png").write_bytes(whole[: len(whole) // 2])
    (photos / "text.jpg").write_text("no image")
    (photos / "empty.gif").touch()
    os.symlink(photos / "nowhere", photos / "dangling.jpg")
    (photos / "notes.txt").write_text("not looked at")
    (photos / "blue bar.png").write_bytes(whole[:60])  # was fine, is broken now
    report = engine.add([photos])
    skipped = {Path(file.path).name: file.reason for file in report.skipped}
    assert set(skipped) == {"cut.png", "text.jpg", "empty.gif", "dangling.jpg", "blue bar.png"}
    assert all(skipped.values())
    assert report.total == 17
    assert str(photos / "blue bar.png") not in [h.path for h in engine.search("a bar", 99, 0)]


def test_rotated_photographs_are_seen_upright(engine, photos):
    upright = draw("red", "bar")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it right
    upright.rotate(90).save(photos / "turned.jpg", exif=exif, quality=95)
    engine.add([photos])
    ranked = [hit.path for hit in engine.search(upright, k=3)]
    assert str(photos / "turned.jpg") in ranked


def test_interruption_keeps_what_is_done(photos, tmp_path, tiny_model, monkeypatch):
    engine = SearchEngine(tmp_path / "index", tiny_model)

    def stop(done, total):
        if done == 8:
            raise KeyboardInterrupt

    report = engine.add([photos], batch_size=4, on_progress=stop)
    assert report.interrupted
    assert report.added == report.total == 8
    report = engine.add([photos], batch_size=4)
    assert (report.added, report.unchanged, report.interrupted) == (10, 8, False)


def test_commits_on_the_way(photos, tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr(indexer, "COMMIT_IMAGES", 4)
    seen = []
    path = tmp_path / "index"

    def watch(done, total):
        seen.append(SearchEngine(path).info().images)

    SearchEngine(path, tiny_model).add([photos], batch_size=2, on_progress=watch)
    assert seen[-1] == 16
    assert {4, 8, 12} <= set(seen)
    assert SearchEngine(path).info().images == 18


def test_the_index_brings_its_own_model(photos, tmp_path, tiny_model, monkeypatch):
    save_model(tiny_model, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    SearchEngine("index", "model").add([photos])
    monkeypatch.chdir("/")
    engine = SearchEngine(tmp_path / "index")
    assert engine.search("a red bar", k=1)
    assert engine.info().model_name == str(tmp_path / "model")


def test_another_model_is_refused_and_rebuild_mends_it(engine, photos):
    other = build_tiny_model("other", seed=7)
    stranger = SearchEngine(engine.path, other)
    with pytest.raises(ModelMismatchError, match="index --rebuild"):
        stranger.search("a bar")
    draw("red", "bar").save(photos / "one more.png")
    with pytest.raises(ModelMismatchError):
        stranger.add([photos])
    assert stranger.add([photos], rebuild=True).added == 19
    assert stranger.search("a bar", k=1)


def test_nothing_to_search_is_a_clear_error(tmp_path, tiny_model):
    engine = SearchEngine(tmp_path / "index", tiny_model)
    with pytest.raises(StoreMissingError, match="blip2-search index"):
        engine.search("a bar")
    (tmp_path / "hollow").mkdir()
    assert engine.add([tmp_path / "hollow"]).total == 0
    with pytest.raises(StoreMissingError, match="blip2-search index"):
        engine.search("a bar")
    with pytest.raises(ImageReadError, match="no such file or folder"):
        SearchEngine(tmp_path / "second", tiny_model).add([tmp_path / "typo"])
    assert not (tmp_path / "second").exists()
    with pytest.raises(VectorIndexError):
        engine.search("a bar", k=0)


def test_a_candidate_that_vanished_is_left_out_and_told(engine, photos, caplog):
    (photos / "red circle.png").unlink()
    hits = engine.search("a red circle", k=18)
    assert len(hits) == 17
    assert "red circle.png" in caplog.text


def test_a_file_is_a_root_too(photos, tmp_path, tiny_model):
    engine = SearchEngine(tmp_path / "index", tiny_model)
    report = engine.add([photos / "red bar.png", photos / "blue bar.png"])
    assert (report.added, report.skipped) == (2, ())
    with pytest.raises(TypeError, match="sequence of paths"):
        engine.add(str(photos))


def test_a_pipe_is_skipped_and_not_waited_for(engine, photos):
    os.mkfifo(photos / "pipe.jpg")
    (skipped,) = engine.add([photos]).skipped
    assert skipped == (str(photos / "pipe.jpg"), "not a regular file")


def test_what_cannot_be_reached_has_not_vanished(engine, photos, monkeypatch):
    def refuse(path, *arguments, **more):
        if str(path).endswith("blue bar.png"):
            raise PermissionError(13, "Permission denied", path)
        return stat(path, *arguments, **more)

    stat = os.stat
    shutil.move(photos / "blue bar.png", photos.parent)  # so that the scan does not see it
    monkeypatch.setattr(os, "stat", refuse)
    assert engine.add([photos]).removed == 0
    monkeypatch.undo()
    assert engine.add([photos]).removed == 1


def test_another_model_is_refused_with_nothing_to_encode(engine, photos):
    with pytest.raises(ModelMismatchError, match="--rebuild"):
        SearchEngine(engine.path, build_tiny_model("other", seed=7)).add([photos])


def test_a_model_that_moved_is_a_clear_error(photos, tmp_path, tiny_model):
    save_model(tiny_model, tmp_path / "model")
    SearchEngine(tmp_path / "index", str(tmp_path / "model")).add([photos])
    (tmp_path / "model").rename(tmp_path / "moved")
    with pytest.raises(ModelMismatchError, match="say where it is now with --model"):
        SearchEngine(tmp_path / "index").search("a bar")
    assert SearchEngine(tmp_path / "index", str(tmp_path / "moved")).search("a bar", k=1)


def test_vectors_held_on_a_device_give_the_same_hits(engine, tiny_model):
    held = SearchEngine(engine.path, tiny_model, search_device="cpu")
    for text in ("a red circle", "a blue bar"):
        assert held.search(text, k=7, rerank=0) == engine.search(text, k=7, rerank=0)


def test_an_interrupt_inside_a_commit_appends_nothing_twice(
    photos, tmp_path, tiny_model, monkeypatch
):
    append = Store.append

    def interrupted(self, records, features):
        append(self, records, features)
        monkeypatch.setattr(Store, "append", append)
        raise KeyboardInterrupt

    monkeypatch.setattr(indexer, "COMMIT_IMAGES", 8)
    monkeypatch.setattr(Store, "append", interrupted)
    report = SearchEngine(tmp_path / "index", tiny_model).add([photos], batch_size=4)
    assert report.interrupted
    assert report.total == report.added == 8


def test_too_little_gpu_memory_is_one_sentence(photos, tmp_path, tiny_model, monkeypatch):
    def overflow(self, pixels):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(type(tiny_model), "encode_pixels", overflow)
    with pytest.raises(DeviceMemoryError, match="--device cpu"):
        SearchEngine(tmp_path / "index", tiny_model).add([photos])


def test_what_does_not_fit_into_gpu_memory_goes_in_halves(
    photos, tmp_path, tiny_model, monkeypatch, engine, encoded
):
    counted = type(tiny_model).encode_pixels

    def small(self, pixels):
        if len(pixels) > 5:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return counted(self, pixels)

    monkeypatch.setattr(type(tiny_model), "encode_pixels", small)
    again = SearchEngine(tmp_path / "again", tiny_model)
    assert again.add([photos], batch_size=12).added == 18
    assert encoded == [3, 3, 6 - 3, 3, 3, 3]
    np.testing.assert_array_equal(again.paths(), engine.paths())
    np.testing.assert_allclose(again.features(), engine.features(), atol=1e-3)


# ---- files that are known by their content ---------------------------------------------------------


@pytest.fixture
def encoded(tiny_model, monkeypatch):
    """Return a list that grows by the number of images of every pass of the encoder."""
    passes = []
    whole = type(tiny_model).encode_pixels

    def count(self, pixels):
        passes.append(len(pixels))
        return whole(self, pixels)

    monkeypatch.setattr(type(tiny_model), "encode_pixels", count)
    return passes


def features_by_name(engine):
    names = [Path(path).name for path in engine.paths()]
    return dict(zip(names, engine.features(), strict=True))


def test_moved_copied_and_touched_files_are_not_encoded_again(engine, photos, tmp_path, encoded):
    before = features_by_name(engine)
    photos.rename(tmp_path / "moved")
    photos.mkdir()
    shutil.copy(tmp_path / "moved" / "red bar.png", photos / "copy.png")
    report = engine.add([photos, tmp_path / "moved"])
    assert (report.added, report.reused, report.removed, report.total) == (19, 19, 18, 19)
    assert encoded == []
    after = features_by_name(engine)
    assert (after.pop("copy.png") == before["red bar.png"]).all()
    assert all((after[name] == before[name]).all() for name in before)
    os.utime(tmp_path / "moved" / "red bar.png")
    report = engine.add([tmp_path / "moved"])
    assert (report.updated, report.reused, report.unchanged) == (1, 1, 17)
    assert engine.add([tmp_path / "moved"]).unchanged == 18
    assert encoded == []


@pytest.mark.parametrize("images_a_commit", [1, 512])
def test_files_that_change_places_keep_their_own_features(
    engine, photos, monkeypatch, encoded, images_a_commit
):
    """Each is the other's twin until the first of them is committed."""
    monkeypatch.setattr(indexer, "COMMIT_IMAGES", images_a_commit)
    monkeypatch.setattr(indexer, "COMMIT_COPIES", images_a_commit)
    before = features_by_name(engine)
    one, other = photos / "red bar.png", photos / "blue circle.png"
    swap = photos / "swap"
    one.rename(swap)
    other.rename(one)
    swap.rename(other)
    report = engine.add([photos])
    assert (report.updated, report.total) == (2, 18)
    assert sum(encoded) == (1 if images_a_commit == 1 else 0)
    after = features_by_name(engine)
    np.testing.assert_allclose(after["red bar.png"], before["blue circle.png"], atol=1e-3)
    np.testing.assert_allclose(after["blue circle.png"], before["red bar.png"], atol=1e-3)
    assert (after["red circle.png"] == before["red circle.png"]).all()


def test_a_new_file_in_the_place_of_a_moved_one(engine, photos, encoded):
    before = features_by_name(engine)
    (photos / "red bar.png").rename(photos / "a moved bar.png")
    draw("white", "circle", size=48).save(photos / "red bar.png")
    report = engine.add([photos])
    assert (report.added, report.updated, report.reused) == (1, 1, 1)
    assert sum(encoded) == 1
    assert (features_by_name(engine)["a moved bar.png"] == before["red bar.png"]).all()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("images_a_commit", [2, 512])
def test_an_interrupt_in_a_commit_mixes_nothing_up(
    engine, photos, monkeypatch, when, images_a_commit
):
    monkeypatch.setattr(indexer, "COMMIT_IMAGES", images_a_commit)
    monkeypatch.setattr(indexer, "COMMIT_COPIES", images_a_commit)
    before = features_by_name(engine)
    one, other = photos / "red bar.png", photos / "blue circle.png"
    one.rename(photos / "swap")
    other.rename(one)
    (photos / "swap").rename(other)
    (photos / "green bar.png").rename(photos / "a moved bar.png")
    draw("white", "circle", size=48).save(photos / "green bar.png")
    os.utime(photos / "yellow bar.png")
    whole, calls = Store.append, []

    def interrupted(self, records, features):
        calls.append(len(records))
        if when == "after":
            whole(self, records, features)
        if len(calls) == 1:
            raise KeyboardInterrupt
        if when == "before":
            whole(self, records, features)

    monkeypatch.setattr(Store, "append", interrupted)
    with suppress(KeyboardInterrupt):
        assert engine.add([photos]).interrupted
    monkeypatch.undo()
    engine.add([photos])
    after = features_by_name(engine)
    assert len(after) == 19
    swapped = {"red bar.png": "blue circle.png", "blue circle.png": "red bar.png"}
    swapped |= {"a moved bar.png": "green bar.png", "yellow bar.png": "yellow bar.png"}
    for name, twin in swapped.items():
        np.testing.assert_allclose(after[name], before[twin], atol=1e-3)
    assert not np.allclose(after["green bar.png"], before["green bar.png"], atol=1e-3)


def test_a_repair_that_cannot_encode_drops_nothing(photos, tmp_path, tiny_model, flip):
    save_model(tiny_model, tmp_path / "model")
    engine = SearchEngine(tmp_path / "index", str(tmp_path / "model"))
    engine.add([photos])
    flip(engine)
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    for _ in range(2):
        with pytest.raises(ModelMismatchError, match="say where it is now with --model"):
            SearchEngine(tmp_path / "index").repair()
        assert len(SearchEngine(tmp_path / "index").verify()) == 1
    damages, report = SearchEngine(tmp_path / "index", str(tmp_path / "elsewhere")).repair()
    assert (len(damages[0].paths), report.added, report.total) == (1, 1, 18)


def test_what_was_encoded_is_kept_when_a_twin_is_damaged(engine, photos, flip):
    flip(engine)
    os.utime(photos / "red bar.png")
    draw("white", "circle", size=48).save(photos / "aaa new.png")
    with pytest.raises(StoreCorruptError, match="verify --repair"):
        engine.add([photos])
    assert any(path.endswith("aaa new.png") for path in engine.paths())


@pytest.fixture
def flip():
    """Return what flips the last byte of an index's features."""

    def flip(engine):
        (segment,) = read_state(engine.path).segments
        file = engine.path / "segments" / segment.file
        content = bytearray(file.read_bytes())
        content[segment.features_end - 1] ^= 1
        file.write_bytes(content)

    return flip


def test_an_engine_sees_what_another_process_changed(engine, photos, tmp_path, tiny_model):
    vectors = tiny_model.encode_texts(["a red bar"])
    engine.search_vectors(vectors, 1)
    (photos / "blue bar.png").unlink()
    SearchEngine(tmp_path / "index", tiny_model).add([photos])
    found = engine.search_vectors(vectors, 99).images[0]
    assert len(found) == len(engine.paths()) == 17


class TestKinds:
    @pytest.fixture
    def few(self, monkeypatch):
        """Let a few images be worth a compact index."""
        monkeypatch.setattr(stored, "_WORTHWHILE", 4)
        monkeypatch.setattr(recall, "FEWEST", 4)
        monkeypatch.setattr(recall, "DEPTH", 4)

    def test_a_compact_index_is_measured_and_answers(self, engine, photos, few):
        exact = engine.search("a red circle", k=3, rerank=0)
        assert engine.info().kind == "auto"
        assert engine.info().recall is None
        engine.add([photos], kind="compact", queries=["a red circle", "a blue bar"])
        info = engine.info()
        assert (info.kind, info.recall.queries, info.needs_measuring) == ("compact", 2, False)
        assert info.recall.recall_at_128 >= 0.999
        assert info.search_bytes == 4 * 18 * info.recall.mean_directions
        assert engine.search("a red circle", k=3, rerank=0) == exact
        engine.add([photos])  # what was asked for stays
        assert engine.info().recall == info.recall
        engine.add([photos], rebuild=True)
        assert engine.info().kind == "compact"
        assert engine.info().recall.queries == len(PROMPTS)
        engine.add([photos], kind="exact")
        assert engine.info().recall is None
        assert engine.search("a red circle", k=3, rerank=0) == exact

    def test_an_interrupt_while_measuring_loses_nothing(self, engine, photos, few, monkeypatch):
        def interrupt(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(stored.StoredIndex, "measure", interrupt)
        report = engine.add([photos], kind="compact")
        assert (report.interrupted, report.unchanged) == (True, 18)
        assert engine.info().needs_measuring
        assert len(engine.search("a red circle", k=18, rerank=0)) == 18

    def test_too_little_memory_is_said_before_anything_is_encoded(
        self, tmp_path, photos, tiny_model, few
    ):
        engine = SearchEngine(tmp_path / "new", tiny_model)
        with pytest.raises(VectorIndexError, match="at least 576 bytes, not 10"):
            engine.add([photos], memory=10)
        assert engine.paths() == []
        with pytest.raises(VectorIndexError, match="kind is one of"):
            engine.add([photos], kind="fast")
        engine.add([photos])
        assert len(engine.search("a red circle", k=18, rerank=0)) == 18

    def test_a_full_disk_costs_time_only(self, tmp_path, photos, tiny_model, monkeypatch, caplog):
        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(stored, "write_shortcut", full)
        engine = SearchEngine(tmp_path / "new", tiny_model)
        assert engine.add([photos]).added == 18
        assert "slower" in caplog.text
        assert engine.info().search_bytes is None
        assert len(engine.search("a red circle", k=18, rerank=0)) == 18
        monkeypatch.undo()
        engine.compact()
        assert engine.info().search_bytes > 0

    def test_a_search_beside_a_writer_that_merges(self, engine, photos, tmp_path):
        before = engine.search("a red circle", k=5, rerank=0)
        other = SearchEngine(engine.path, engine._model)
        whole = engine._ready
        merged = []

        def ready():
            opened = whole()
            if not merged:
                merged.append(1)
                with other_store.writing():
                    other_store.remove([before[-1].path])
                    other_store.compact()
            return opened

        other_store = Store.open(other.path)
        engine._ready = ready
        vectors = engine._model.encode_texts(["a red circle"])
        found, _ = engine._nearest(engine._ready()[0], vectors, 4)
        assert [image.path for image in found] == [hit.path for hit in before[:4]]

    def test_compact_gives_back_the_room_of_removed_images(self, engine, photos):
        before = engine.info().size_on_disk
        sorted(photos.iterdir())[0].unlink()
        sorted(photos.iterdir())[0].unlink()
        engine.add([photos])
        assert engine.info().size_on_disk == pytest.approx(before, rel=0.01)  # a row in nine
        engine.compact()
        assert engine.info().size_on_disk < before
        assert len(engine.search("a red circle", k=18, rerank=0)) == 16

    def test_a_damaged_shortcut_is_named_and_mended(self, engine, photos):
        (shortcut,) = (engine.path / "shortcuts").glob("*-*.arrow")
        content = bytearray(shortcut.read_bytes())
        content[len(content) // 2] ^= 1
        shortcut.write_bytes(content)
        (damage,) = engine.verify()
        assert (damage.file, damage.images) == (shortcut.absolute(), 0)
        damages, report = engine.repair()
        assert damages == [damage]
        assert report is None
        assert engine.verify() == []
        assert shortcut.exists()


class TestRankTexts:
    TEXTS = ("a red circle", "a blue bar", "a red circle", "something else entirely")

    def test_by_itc_alone(self, engine, photos, tiny_model):
        photo = sorted(photos.iterdir())[3]
        features = tiny_model.encode_images([photo])[0]
        itc = (features @ tiny_model.encode_texts(self.TEXTS).T).max(axis=0)
        hits = engine.rank_texts(photo, self.TEXTS, k=4, rerank=0)
        assert [hit.text for hit in hits] == [
            self.TEXTS[i] for i in np.argsort(-itc, kind="stable")
        ]
        assert [hit.score for hit in hits] == pytest.approx(sorted(itc, reverse=True), abs=1e-5)
        assert [(hit.rank, hit.itm) for hit in hits] == [(1, None), (2, None), (3, None), (4, None)]

    def test_reranked(self, engine, photos, tiny_model):
        photo = sorted(photos.iterdir())[3]
        hits = engine.rank_texts(photo, self.TEXTS, k=3)
        assert len(hits) == 3
        tokens = tiny_model.image_tokens([photo])
        for hit in hits:
            assert hit.itm == pytest.approx(tiny_model.match(tokens, [hit.text])[0], abs=1e-4)
            assert hit.score == pytest.approx(hit.itc + hit.itm, abs=1e-5)
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)

    def test_needs_no_index(self, tmp_path, photos, tiny_model):
        empty = SearchEngine(tmp_path / "none", tiny_model)
        assert len(empty.rank_texts(Image.new("RGB", (40, 30)), ["a", "b"], k=1)) == 1
        with pytest.raises(VectorIndexError):
            empty.rank_texts(sorted(photos.iterdir())[0], [])


def test_one_image_pairs_with_many_texts(photos, tiny_model):
    paths = sorted(photos.iterdir())[:2]
    texts = ["a red circle", "a bar", "white"]
    one = tiny_model.image_tokens(paths[:1])
    expected = tiny_model.match(one.expand(3, -1, -1), texts)
    assert tiny_model.match(one, texts, batch_size=2) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="2 images cannot pair with 3 texts"):
        tiny_model.match(tiny_model.image_tokens(paths), texts)


class TestRerankFeatures:
    """The tiny model's tokens are few: a new index keeps them by itself."""

    @pytest.fixture
    def engine(self, photos, tmp_path, tiny_model):
        engine = SearchEngine(tmp_path / "keeps", tiny_model)
        engine.add([photos])
        return engine

    def scores(self, hits):
        return {hit.path: hit.itm for hit in hits}

    def test_they_stand_for_the_photographs(self, engine, photos, tiny_model):
        assert engine.info().rerank_features == "int8"
        exact = {path: itm for path, _, itm in by_hand(tiny_model, photos, "a red circle")}
        found = self.scores(engine.search("a red circle", k=18, rerank=18))
        assert found == pytest.approx(exact, abs=0.02)
        assert found != exact
        for photo in photos.iterdir():  # and no file is looked at
            photo.unlink()
        assert self.scores(engine.search("a red circle", k=18, rerank=18)) == found

    def test_fp16_is_nearly_exact_and_none_decodes(self, engine, photos, tiny_model):
        exact = {path: itm for path, _, itm in by_hand(tiny_model, photos, "a red circle")}
        assert engine.add([photos], rerank_features="fp16").updated == 0  # int8 will do
        report = engine.add([photos], rerank_features="fp16", rebuild=True)
        assert report.added == 18
        found = self.scores(engine.search("a red circle", k=18, rerank=18))
        assert found == pytest.approx(exact, abs=1e-3)
        engine.add([photos], rerank_features="none", rebuild=True)
        assert engine.info().rerank_features == "none"
        with pytest.raises(VectorIndexError, match="rerank features are one of"):
            engine.add([photos], rerank_features="int4")

    def test_switched_on_later_they_are_made(self, photos, tmp_path, tiny_model):
        engine = SearchEngine(tmp_path / "later", tiny_model)
        engine.add([photos], rerank_features="none")
        assert not (tmp_path / "later" / "tokens").exists()
        assert engine.add([photos]).unchanged == 18
        assert engine.add([photos], rerank_features="int8").updated == 18
        assert len(list((tmp_path / "later" / "tokens").glob("*/*/*"))) == 18
        assert engine.add([photos]).unchanged == 18

    def test_an_index_from_before_does_not_begin_by_itself(self, photos, tmp_path, tiny_model):
        engine = SearchEngine(tmp_path / "later", tiny_model)
        first, *others = sorted(photos.iterdir())
        engine.add([first], rerank_features="none")
        store = Store.open(engine.path)
        with store.writing():
            store.change_settings(dataclasses.replace(store.settings, rerank_features="auto"))
        assert engine.add([photos]).added == len(others)
        assert engine.info().rerank_features == "none"
        assert engine.add([photos]).unchanged == 18

    def test_a_damaged_file_means_the_photograph(self, engine, photos, tiny_model):
        for file in (engine.path / "tokens").glob("*/*/*"):
            file.write_bytes(file.read_bytes()[:-1])
        exact = {path: itm for path, _, itm in by_hand(tiny_model, photos, "a red circle")}
        found = self.scores(engine.search("a red circle", k=18, rerank=18))
        assert found == pytest.approx(exact, abs=1e-4)

    def test_compact_drops_those_of_removed_images(self, engine, photos):
        photo = sorted(photos.iterdir())[0]
        photo.rename(photos / "moved.png")  # the same content
        sorted(photos.iterdir())[0].unlink()
        engine.add([photos])
        engine.compact()
        assert len(list((engine.path / "tokens").glob("*/*/*"))) == 17
