"""From a model in PyTorch to graphs for ONNX Runtime; see `onnx_model.py` for what they are.

python -m blip2_search.retrieval.onnx_export    exports the embedded model again, where it lies
"""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
import struct
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn

from ..indexes.files import TEMPORARY, replace_file
from .checkpoints import save_model
from .errors import BackendError, CheckpointError, first_line
from .loading import load_model
from .model import MATCH, RetrievalModel
from .names import DEFAULT_MODEL
from .onnx_exports import DESCRIPTION, FORMAT, export_folder, find_export, sources
from .onnx_sessions import SMALL
from .own_format import EMBEDDED, WEIGHTS
from .text_batch import TextBatch

log = logging.getLogger(__name__)


class _Graph(nn.Module):
    """A part of a model, as a module that can be exported."""

    def __init__(self, model: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self._function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self._function(self.model, *inputs)


def _encoder(model: RetrievalModel, pixels: Tensor) -> Tensor:
    return model.encode_pixels(pixels)


def _queries(model: RetrievalModel, image_tokens: Tensor) -> Tensor:
    return model.features_from_encoder(image_tokens)


def _texts(model: RetrievalModel, token_ids: Tensor, mask: Tensor) -> Tensor:
    return model.text_features(TextBatch(token_ids, mask))


def _match(
    model: RetrievalModel,
    image_tokens: Tensor,
    token_ids: Tensor,
    mask: Tensor,
    image_of: Tensor,
    text_of: Tensor,
) -> Tensor:
    text, tokens = TextBatch(token_ids, mask), model.normalise_tokens(image_tokens)
    return model.match_logits(tokens, text, image_of, text_of)[:, MATCH]


def export(name: str) -> Path:
    """Export a model to the user's cache, in place of an older export of the same name.

    Args:
        name: as for `load_model`.

    Returns:
        the folder of the export.

    Raises:
        BackendError: what that needs is not installed, or the cache cannot be written.
        CheckpointError: the model cannot be loaded or exported.
    """
    _check_packages()
    folder = export_folder(name)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if find_export(name) is None:  # another process may have made it meanwhile
                log.warning("exporting %s for ONNX Runtime, once: about a minute", name)
                _export_into(folder, name)
    except OSError as error:
        raise BackendError(
            f"the export of {name} cannot be written ({error}): --backend torch"
        ) from error
    return folder


def _export_into(folder: Path, name: str) -> None:
    """Make the folder, whole or not at all, in place of an older one."""
    _sweep(folder)  # what a killed run left
    partial = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}{TEMPORARY}")
    made_of = sources(name)  # before loading: what changes meanwhile makes the export outdated
    model = load_model(name, device="cpu")
    try:
        save_model(model, partial)
        write_graphs(model, partial, made_of or sources(name))  # or it was not downloaded before
        if folder.exists():
            folder.rename(partial.with_suffix(f".old{TEMPORARY}"))
        partial.rename(folder)
    finally:
        _sweep(folder)


def _sweep(folder: Path) -> None:
    for left in folder.parent.glob(f"{folder.name}.*{TEMPORARY}"):
        shutil.rmtree(left, ignore_errors=True)


def can_export() -> bool:
    """Return whether what exporting takes is installed."""
    return all(map(importlib.util.find_spec, ("onnx", "onnxscript")))


def _check_packages() -> None:
    if not can_export():
        raise BackendError(
            "exporting a model takes two packages more: pip install 'blip2-search[onnx]', or choose "
            "--backend torch"
        )


def write_graphs(model: RetrievalModel, folder: Path, made_of: dict[str, list[int]]) -> None:
    """Write the graphs beside a model's weights.

    Args:
        model: in float32 on the CPU.
        folder: holds it in our own format, in any float type.
        made_of: the files that it was loaded from, with size and time.

    Raises:
        CheckpointError: the model cannot be exported.
    """
    where = _places(folder / WEIGHTS)
    for name, (function, inputs, sizes, outputs) in _signatures(model).items():
        try:
            graph = onnx_graph(model, function, inputs, sizes, outputs)
        except Exception as error:  # every layer of the exporter has errors of its own
            raise CheckpointError(
                f"{model.name} cannot be exported to ONNX: {first_line(error)}"
            ) from error
        _point_to_weights(graph, where)
        replace_file(folder / f"{name}.onnx", graph.SerializeToString())
    description = {
        "format": FORMAT, "name": model.name, "fingerprint": model.fingerprint, "sources": made_of,
    }  # fmt: skip
    replace_file(folder / DESCRIPTION, (json.dumps(description, indent=2) + "\n").encode())


def _signatures(model: RetrievalModel) -> dict[str, tuple[Any, ...]]:
    """Return of each graph its function, examples of its inputs, their free sizes, its outputs."""
    size, batch = torch.export.Dim, 65536
    n, m, b = (size(name, min=1, max=batch) for name in ("images", "texts", "pairs"))
    t = size("text_tokens", min=2, max=model.config.preprocess.max_text_tokens)
    side = model.config.preprocess.image_size
    pixels = torch.zeros(3, 3, side, side)
    token_ids = torch.ones(2, 7, dtype=torch.int64)
    text = {"token_ids": token_ids, "mask": token_ids > 0}
    text_sizes = {"token_ids": {0: m, 1: t}, "mask": {0: m, 1: t}}
    with torch.inference_mode():
        image_tokens = model.encode_pixels(pixels).clone()
    pairs = {"image_of": torch.tensor([0, 1, 2, 2, 1]), "text_of": torch.tensor([0, 1, 1, 1, 0])}
    signatures: dict[str, tuple[Any, ...]] = {
        "encoder": (_encoder, {"pixels": pixels}, {"pixels": {0: n}}, ["tokens"]),
        "queries": (
            _queries,
            {"image_tokens": image_tokens},
            {"image_tokens": {0: n}},
            ["features"],
        ),
        "texts": (_texts, text, text_sizes, ["features"]),
    }
    if model.reranks:
        signatures["match"] = (
            _match,
            {"image_tokens": image_tokens, **text, **pairs},
            {"image_tokens": {0: n}, **text_sizes, "image_of": {0: b}, "text_of": {0: b}},
            ["itm_logits"],
        )
    return signatures


def onnx_graph(
    model: nn.Module, function: Callable[..., Any], inputs: Any, sizes: Any, outputs: list[str]
) -> Any:
    """Return a part of a model as a graph, an `onnx.ModelProto` that holds its weights.

    Args:
        model: on the CPU.
        function: of the model and the inputs.
        inputs: an example of each, by name.
        sizes: the dimensions of each that are free, as `torch.export.Dim`.
        outputs: their names.
    """
    from onnxscript.optimizer import fold_constants, remove_unused_nodes

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, about itself
        program = torch.export.export(
            _Graph(model, function).eval(),
            tuple(value.clone() for value in inputs.values()),
            dynamic_shapes=(tuple(sizes.values()),),
            strict=False,
        )
        found = torch.onnx.export(
            program, (), input_names=list(inputs), output_names=outputs,
            dynamo=True, optimize=False, verbose=False,
        )  # fmt: skip
    if found is None:
        raise CheckpointError("torch.onnx gave nothing")
    # Arithmetic on constants and sizes is done here; that on weights would give them other names,
    # and ONNX Runtime does it.
    fold_constants(found.model, should_fold=_knows_no_weight)
    remove_unused_nodes(found.model)
    return found.model_proto


def _knows_no_weight(node: Any) -> bool | None:
    """Forbid to compute with weights beforehand; None leaves the rest to the optimiser."""
    weights = any(
        value is not None and str(value.name).startswith("model.") for value in node.inputs
    )
    return False if weights else None


def _places(file: Path) -> dict[str, dict[str, Any]]:
    """Return where each tensor of a safetensors file lies: its type and its first and last byte."""
    with open(file, "rb") as opened:
        (size,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(size))
    header.pop("__metadata__", None)
    for entry in header.values():
        entry["data_offsets"] = [8 + size + offset for offset in entry["data_offsets"]]
    return dict(header)


def _point_to_weights(proto: Any, where: dict[str, dict[str, Any]]) -> None:
    """Replace the weights in a graph by where they lie in `model.safetensors`, in its type."""
    from onnx import TensorProto, helper

    types = {"F32": TensorProto.FLOAT, "F16": TensorProto.FLOAT16, "BF16": TensorProto.BFLOAT16}
    casts = []
    for tensor in proto.graph.initializer:
        entry = where.get(tensor.name.removeprefix("model."))
        if entry is None or entry["dtype"] not in types or tensor.data_type != TensorProto.FLOAT:
            continue
        first, last = entry["data_offsets"]
        if last - first < SMALL:
            continue
        if entry["shape"] != list(tensor.dims):
            raise CheckpointError(f"the exported {tensor.name} has another shape than the weight")
        name, shape = tensor.name, list(tensor.dims)
        tensor.Clear()
        tensor.name, tensor.data_type = name, types[entry["dtype"]]
        tensor.dims.extend(shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", WEIGHTS), ("offset", first), ("length", last - first)):
            tensor.external_data.add(key=key, value=str(value))
        if tensor.data_type != TensorProto.FLOAT:
            tensor.name = f"{name}.stored"
            casts.append(helper.make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *proto.graph.node]
    for node in nodes:
        node.ClearField("metadata_props")  # where in the source it comes from: most of the file
        node.ClearField("doc_string")
    proto.graph.ClearField("value_info")
    proto.graph.ClearField("node")
    proto.graph.node.extend(nodes)


def main() -> None:
    """Export the embedded model again."""
    folder = EMBEDDED / DEFAULT_MODEL
    write_graphs(load_model(DEFAULT_MODEL, device="cpu"), folder, {})


if __name__ == "__main__":
    main()
