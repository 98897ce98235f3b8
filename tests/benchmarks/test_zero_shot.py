"""Zero-shot classification against a plain loop, and the classes that are held back."""

import json

import numpy as np
import pytest

from blip2_search.benchmarks.zero_shot import accuracy, hold_back, label_scores
from blip2_search.retrieval.data import TEMPLATES, read_captioned, read_labelled


def test_accuracy_counts_ties_as_wrong():
    scores = np.array([[3, 2, 1], [1, 1, 0], [0, 1, 2]], np.float32)
    truth = np.array([0, 0, 0])
    assert accuracy(scores, truth, 1) == pytest.approx(100 / 3)
    assert accuracy(scores, truth, 2) == pytest.approx(200 / 3)
    assert accuracy(scores, truth, 3) == 100


def test_scores_are_the_mean_over_templates(tiny_model, photos):
    paths = sorted(photos.iterdir())[:3]
    labels = ["a circle", "a bar"]
    scores = label_scores(tiny_model, paths, labels)
    for i, path in enumerate(paths):
        for j, label in enumerate(labels):
            image = tiny_model.encode_images([path])[0]
            texts = tiny_model.encode_texts([t.format(label) for t in TEMPLATES])
            expected = np.mean([max(query @ text for query in image) for text in texts])
            assert np.isclose(scores[i, j], expected, atol=1e-5)


def test_held_back_classes_are_not_trained_on(tmp_path):
    labels = ["dog", "cat", "bus", "dog", "cup"]
    file, out = tmp_path / "labels.json", tmp_path / "split.json"
    file.write_text(
        json.dumps([{"filename": f"{i}.png", "label": x} for i, x in enumerate(labels)])
    )
    assert hold_back(file, out) == 3  # of bus, cat, cup, dog, every second class
    trained = read_captioned(out, tmp_path, ["train"])
    held = read_labelled(out, tmp_path, ["held-back"])
    assert {image.group for image in trained} == {"bus", "cup"}
    assert {image.group for image in held} == {"cat", "dog"}
