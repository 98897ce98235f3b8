"""Caption files, augmentation, batches, and the cache of encoded images."""

import io
import itertools
import json
import tarfile
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from blip2_search.retrieval.augment import random_crop
from blip2_search.retrieval.batches import CachedTokens, DrawnImages, epoch_rows
from blip2_search.retrieval.data import (
    CaptionedImage,
    read_captioned,
    read_karpathy,
    read_labelled,
)
from blip2_search.retrieval.distributed import World
from blip2_search.retrieval.errors import DatasetError, EmptySplitError
from blip2_search.retrieval.feature_cache import encoder_tokens
from blip2_search.retrieval.recipe import DataConfig
from blip2_search.retrieval.shards import Shards
from tiny import build_tiny_model

ALONE = World()


@pytest.fixture
def images(photos):
    paths = sorted(photos.iterdir())
    return [CaptionedImage(path=p, captions=(p.stem, f"a {p.stem}"), group=p.stem) for p in paths]


def test_karpathy_files(tmp_path):
    file = tmp_path / "dataset.json"
    entry = {
        "filename": "a.jpg",
        "filepath": "val2014",
        "split": "val",
        "sentences": [{"raw": "A cat."}],
    }
    file.write_text(json.dumps({"images": [entry]}))
    (image,) = read_captioned(file, tmp_path, ["val"])
    assert image.path == tmp_path / "val2014" / "a.jpg"
    assert image.captions == ("A cat.",)
    with pytest.raises(EmptySplitError, match="no image in the split"):
        read_karpathy(file, tmp_path, ["train"])
    file.write_text("[]")
    with pytest.raises(DatasetError, match="Karpathy"):
        read_karpathy(file, tmp_path)
    with pytest.raises(DatasetError, match="cannot read"):
        read_karpathy(tmp_path / "none.json", tmp_path)
    file.write_text("{")
    with pytest.raises(DatasetError, match="is no JSON"):
        read_captioned(file, tmp_path, ["train"])


TABLE = {
    "filename": ["a.jpg", "b.jpg", "a.jpg", "c.jpg"],
    "caption": ["one, or two", "other", "second", "held"],
    "split": ["train", "train", "train", "val"],
}


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet"])
def test_tables(tmp_path, suffix):
    file = tmp_path / f"captions.{suffix}"
    if suffix == "parquet":
        parquet.write_table(pa.table(TABLE), file)
    else:
        separator = "\t" if suffix == "tsv" else ","
        rows = zip(*TABLE.values(), strict=True)
        lines = [list(TABLE), *([f'"{cell}"' for cell in row] for row in rows)]
        file.write_text("\n".join(separator.join(line) for line in lines) + "\n")
    a, b = read_captioned(file, tmp_path, ["train"])
    assert (a.path, a.captions) == (tmp_path / "a.jpg", ("one, or two", "second"))
    assert (b.path, b.captions) == (tmp_path / "b.jpg", ("other",))
    (held,) = read_captioned(file, tmp_path, ["val"])
    assert held.captions == ("held",)


def test_a_table_may_list_the_captions_and_have_no_splits(tmp_path):
    file = tmp_path / "captions.parquet"
    parquet.write_table(pa.table({"path": ["a.jpg"], "captions": [["one", "two"]]}), file)
    (image,) = read_captioned(file, tmp_path, ["train"])
    assert image.captions == ("one", "two")
    with pytest.raises(EmptySplitError):
        read_captioned(file, tmp_path, ["val"])


def test_tables_that_cannot_be_read(tmp_path):
    file = tmp_path / "captions.csv"
    with pytest.raises(DatasetError, match="cannot read"):
        read_captioned(file, tmp_path, ["train"])
    file.write_text("picture,caption\na.jpg,b\n")
    with pytest.raises(DatasetError, match=r"no column called path, .*it has picture, caption"):
        read_captioned(file, tmp_path, ["train"])
    (tmp_path / "captions.parquet").write_bytes(b"PAR1 not")
    with pytest.raises(DatasetError, match="cannot read"):
        read_captioned(tmp_path / "captions.parquet", tmp_path, ["train"])
    file.write_text("path,caption,split\n000123,7,\n")
    (image,) = read_captioned(file, tmp_path, ["train"])
    assert image.path == tmp_path / "000123"
    assert image.captions == ("7",)
    parquet.write_table(pa.table({"path": ["a"], "caption": [7]}), tmp_path / "captions.parquet")
    with pytest.raises(DatasetError, match="7 in the column caption is no caption"):
        read_captioned(tmp_path / "captions.parquet", tmp_path, ["train"])
    with pytest.raises(DatasetError, match=r"captions come as \.json"):
        read_captioned(tmp_path / "captions.txt", tmp_path, ["train"])


def test_labels_become_captions_in_groups(tmp_path):
    file = tmp_path / "labels.json"
    entries = [
        {"filename": f"{i}.jpg", "wnid": wnid, "label": label}
        for i, (wnid, label) in enumerate(
            [("n07747607", "orange"), ("n03642806", "laptop"), ("n03642806", "laptop")]
        )
    ]
    file.write_text(json.dumps(entries))
    orange, one, other = read_labelled(file, tmp_path / "images")
    assert "a photo of an orange" in orange.captions
    assert "a photo of a laptop" in one.captions
    assert "a photo of a laptop computer" in one.captions  # a synonym
    assert one.group == other.group != orange.group
    assert one.path == tmp_path / "images" / "1.jpg"
    file.write_text('[{"filename": "a.jpg"}]')
    with pytest.raises(DatasetError, match="no list of labelled photographs: KeyError"):
        read_labelled(file, tmp_path)


def test_random_crops_keep_their_share_and_flip_half(rng):
    # A photograph whose colours tell where a pixel was: red grows to the right, green downwards.
    ramp = np.zeros((100, 200, 3), np.uint8)
    ramp[..., 0] = np.linspace(0, 250, 200)[None, :]
    ramp[..., 1] = np.linspace(0, 250, 100)[:, None]
    image = Image.fromarray(ramp)
    shares, flipped = [], 0
    for _ in range(200):
        crop = np.asarray(random_crop(image, (16, 16), rng, scale=(0.3, 0.6))).astype(float)
        width, height = np.ptp(crop[8, :, 0]) / 250, np.ptp(crop[:, 8, 1]) / 250
        shares.append(width * height)
        flipped += crop[8, 0, 0] > crop[8, -1, 0]
    assert 0.2 < min(shares) < 0.35
    assert 0.5 < max(shares) < 0.65
    assert 70 < flipped < 130
    never = [random_crop(image, (16, 16), rng, flip=False) for _ in range(20)]
    assert all(np.asarray(c)[8, 0, 0] < np.asarray(c)[8, -1, 0] for c in never)


def test_an_epoch_sees_every_image_once_and_the_next_in_another_order():
    batches = [epoch_rows(number, images=10, batch_size=3, seed=0) for number in range(6)]
    assert [epoch for epoch, _ in batches] == [0, 0, 0, 1, 1, 1]
    first = np.concatenate([rows for _, rows in batches[:3]])
    second = np.concatenate([rows for _, rows in batches[3:]])
    assert len(set(first)) == len(set(second)) == 9
    assert list(first) != list(second)


@pytest.mark.parametrize("workers", [0, 2])
def test_drawn_batches_are_a_function_of_their_number(images, workers):
    transform = build_tiny_model().image_transform
    source = DrawnImages(images, transform, DataConfig(workers=workers))

    def some(first, count, world=ALONE):
        return list(itertools.islice(source.batches(6, first, 7, world), count))

    whole = some(0, 5)
    assert whole[0].images.shape == (6, 3, 64, 64)
    for again, batch in zip(some(3, 2), whole[3:], strict=True):
        assert torch.equal(again.images, batch.images)
        assert again.captions == batch.captions
    halves = [some(0, 1, World(rank=rank, size=2))[0] for rank in (0, 1)]
    assert torch.equal(torch.cat([half.images for half in halves]), whole[0].images)
    assert halves[0].captions + halves[1].captions == whole[0].captions


def test_several_captions_of_an_image_stand_together(images, tmp_path):
    model = build_tiny_model()
    data = [replace(image, captions=("one", "two", "three")) for image in images[:3]]
    data.append(replace(images[3], captions=("alone",)))
    cache = encoder_tokens(model, [image.path for image in data], tmp_path, DataConfig())
    config = DataConfig(captions_per_image=2, workers=0)
    drawn = DrawnImages(data, model.image_transform, config)
    for source in (CachedTokens(data, cache, 2), drawn):
        batch = next(source.batches(4, 0, 0, ALONE))
        assert len(batch.images) == len(batch.group_ids) == 4
        pairs = list(zip(batch.captions[::2], batch.captions[1::2], strict=True))
        assert pairs.count(("alone", "alone")) == 1
        assert sum(len({*pair}) == 2 for pair in pairs) == 3


def test_broken_images_are_skipped_and_told(images, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    bad = CaptionedImage(path=broken, captions=("x",), group="x")
    model = build_tiny_model()
    data = [images[0], bad, *images[1:]]
    drawn = DrawnImages(data, model.image_transform, DataConfig(workers=0))
    epoch = next(drawn.batches(len(data), 0, 0, ALONE))
    assert len(epoch.images) == len(data)  # another image stands in
    assert "x" not in epoch.captions
    assert len(epoch.skipped) == 1
    assert "broken.png: not an image" in epoch.skipped[0]

    cache = encoder_tokens(model, [i.path for i in data], tmp_path / "cache", DataConfig())
    assert len(cache.tokens) == len(images)
    assert 1 not in cache.rows
    stored = CachedTokens(data, cache)
    assert stored.images == len(images)
    first, second = itertools.islice(stored.batches(6, 0, 0, ALONE), 2)
    assert "broken.png: not an image" in first.skipped[0]
    assert second.skipped == []
    with pytest.raises(DatasetError, match="no image can be read"):
        CachedTokens([bad], encoder_tokens(model, [broken], tmp_path / "cache", DataConfig()))
    with pytest.raises(DatasetError, match="none of the 1 images can be read"):
        next(
            DrawnImages([bad], model.image_transform, DataConfig(workers=0)).batches(1, 0, 0, ALONE)
        )


def test_cached_views_are_drawn_once_and_the_first_is_the_image(images, tmp_path):
    model = build_tiny_model()
    paths = [image.path for image in images[:3]]
    cache = encoder_tokens(model, paths, tmp_path, DataConfig(), views=3)
    assert [tokens.shape for tokens in cache.tokens] == [(3, 4, 256)] * 3
    assert cache.tokens[0].dtype == np.float16
    with torch.inference_mode():
        plain = model.image_tokens(paths)
    assert np.allclose(np.stack(cache.tokens)[:, 0], plain.numpy(), atol=2e-2)
    assert not np.allclose(cache.tokens[0][0], cache.tokens[0][1], atol=2e-2)
    files = sorted(tmp_path.rglob("*.arrow"))
    told = []
    encoder_tokens(
        model, paths, tmp_path, DataConfig(), views=3, on_progress=lambda *n: told.append(n)
    )
    assert told == []  # nothing was encoded again
    assert sorted(tmp_path.rglob("*.arrow")) == files
    for other in (DataConfig(flip=False), DataConfig(crop_scale=(0.1, 1.0))):
        encoder_tokens(model, paths, tmp_path, other, views=3)
    assert len(list(tmp_path.rglob("*.arrow"))) == len(files) + 2
    assert not list(tmp_path.rglob("*.partial"))


def test_a_cache_that_was_interrupted_goes_on(images, tmp_path, monkeypatch):
    from blip2_search.retrieval import feature_cache

    monkeypatch.setattr(feature_cache, "IMAGES_A_FILE", 5)
    monkeypatch.setattr(feature_cache, "IMAGES_A_BATCH", 2)
    model = build_tiny_model()
    paths = [image.path for image in images]
    told = []

    def interrupt(done, total):
        told.append((done, total))
        if done >= 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encoder_tokens(model, paths, tmp_path / "c", DataConfig(), on_progress=interrupt)
    assert told[-1] == (12, 18)
    told.clear()
    cache = encoder_tokens(
        model, paths, tmp_path / "c", DataConfig(), on_progress=lambda *n: told.append(n)
    )
    assert told[0] == (12, 18)  # the first ten were kept
    assert cache.rows == list(range(18))
    whole = encoder_tokens(model, paths, tmp_path / "whole", DataConfig())
    for ours, theirs in zip(cache.tokens, whole.tokens, strict=True):
        assert np.allclose(ours, theirs, atol=1e-2)


def shard(path, samples):
    with tarfile.open(path, "w") as tar:
        for name, content in samples:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


# A stream that is left in its middle leaves a shard open for the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_shards_stream_for_ever(images, tmp_path):
    pytest.importorskip("webdataset")
    for number in range(2):
        samples = []
        for i, image in enumerate(images[9 * number : 9 * number + 9]):
            samples.append((f"{i}.png", image.path.read_bytes()))
            if number:
                samples.append((f"{i}.txt", image.captions[0].encode()))
            else:
                content = json.dumps({"caption": image.captions[0]}).encode()
                samples.append((f"{i}.json", content))
        samples += [("bad.png", b"no image"), ("bad.txt", b"x"), ("bare.png", b"y")]
        samples += [("odd.png", b"y"), ("odd.json", b'{"caption": null}')]
        shard(tmp_path / f"s-{number}.tar", samples)
    whole = (tmp_path / "s-1.tar").read_bytes()
    (tmp_path / "s-2.tar").write_bytes(whole[: len(whole) // 2])  # a download that broke off
    transform = build_tiny_model().image_transform
    source = Shards([str(tmp_path / "s-{0..3}.tar")], transform, DataConfig(workers=0))
    assert source.images is None
    batches = list(itertools.islice(source.batches(4, 0, 0, ALONE), 30))
    assert all(batch.images.shape == (4, 3, 64, 64) for batch in batches)
    seen = {caption for batch in batches for caption in batch.captions}
    assert seen == {image.captions[0] for image in images}
    reasons = [reason for batch in batches for reason in batch.skipped]
    assert any("bad: not an image" in reason for reason in reasons)
    assert any("bare: the sample has no .txt" in reason for reason in reasons)
    assert any("None is no caption" in reason for reason in reasons)
    assert any("s-3.tar" in reason for reason in reasons)  # which is not there
    # Another process draws other samples.
    other = next(source.batches(8, 0, 0, World(rank=1, size=2)))
    assert len(other.images) == 4
    # Samples of one caption but of different images are different groups.
    assert len(set(batches[0].group_ids.tolist())) == len(set(batches[0].captions))


# A stream that is left in its middle leaves a shard open for the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_shards_of_nothing_are_given_up(tmp_path):
    pytest.importorskip("webdataset")
    shard(tmp_path / "s.tar", [(f"{i}.txt", b"words") for i in range(5)])
    transform = build_tiny_model().image_transform
    source = Shards([str(tmp_path / "s.tar")], transform, DataConfig(workers=0))
    with pytest.raises(DatasetError, match=r"nothing readable in the shards.*has no \.jpg"):
        next(source.batches(2, 0, 0, ALONE))
