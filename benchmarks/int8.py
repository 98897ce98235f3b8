"""What int8 adds to encoding images by `mini` on a CPU, and what it loses.

    python -m blip2_search.benchmarks.int8 --data dataset_flickr8k.json --images DIR

ONNX Runtime quantises the encoder's graph: a scale a channel for weights, a range for activations from
training photographs. The validation split is encoded by both, batches in turns; a ratio is the median
of ratios of neighbours. Needs the extra `onnx`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..indexes.base import Float32
from ..retrieval.data import captions_and_owners, read_split
from ..retrieval.metrics import recall_table
from ..retrieval.model import itc_similarities
from ..retrieval.names import DEFAULT_MODEL
from ..retrieval.onnx_model import OnnxModel
from ..retrieval.onnx_sessions import open_session
from ..retrieval.own_format import EMBEDDED
from .tables import int8_table

BATCH = 32


def quantised(graph: Path, photographs: Sequence[Float32], folder: Path) -> Path:
    """Write an encoder's graph in int8.

    Args:
        graph: takes `pixels` (N, 3, S, S).
        photographs: pixels (3, S, S), to see how large activations become.
        folder: for it and for what is made on the way.
    """
    import onnxruntime as ort
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = iter(photographs)

        def get_next(self) -> dict[str, Float32] | None:
            pixels = next(self._left, None)
            return None if pixels is None else {"pixels": pixels[None]}

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folder / "fp32.onnx")  # batch norms folded, weights fp32
    ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    quantize_static(
        folder / "fp32.onnx", folder / "int8.onnx", Reader(),
        per_channel=True, weight_type=QuantType.QInt8, activation_type=QuantType.QUInt8,
        reduce_range=True,  # of 7 bits: AVX2 adds up pairs of products in 16
    )  # fmt: skip
    return folder / "int8.onnx"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="captions with splits")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--calibrate", type=int, default=96, help="training photographs")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    folder_of_model = EMBEDDED / DEFAULT_MODEL
    model, graph = OnnxModel(folder_of_model), folder_of_model / "encoder.onnx"
    training = read_split(args.data, args.images, "train")[: args.calibrate]
    dataset = read_split(args.data, args.images, "val")
    seconds: dict[str, list[float]] = {"fp32": [], "int8": []}
    tokens: dict[str, list[Float32]] = {"fp32": [], "int8": []}
    with tempfile.TemporaryDirectory() as folder:
        seen = [model.image_transform(image.path) for image in training]
        int8 = quantised(graph, seen, Path(folder))
        sessions = {"fp32": open_session(graph, None), "int8": open_session(int8, None)}
        for start in range(0, len(dataset), BATCH):
            images = dataset[start : start + BATCH]
            pixels = np.stack([model.image_transform(image.path) for image in images])
            for name, session in sessions.items():
                begun = time.perf_counter()
                tokens[name] += session.run(None, {"pixels": pixels})
                seconds[name].append(time.perf_counter() - begun)
    captions, owner = captions_and_owners(dataset)
    texts = model.encode_texts(captions)
    report: dict[str, Any] = {"images": len(dataset), "batch": BATCH, "precisions": {}}
    for name, parts in tokens.items():
        features = model.features_from_encoder(torch.from_numpy(np.concatenate(parts)))
        report["precisions"][name] = {
            "seconds": seconds[name],
            **recall_table(itc_similarities(features, texts), owner),
        }
    print(int8_table(report))
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
