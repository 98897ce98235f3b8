"""Graphs of ONNX Runtime, opened: optimised once on a machine, and memory-mapped from then on.

What ONNX Runtime makes of a graph when it opens it, it would make again in each process: most of the
time of a first answer. So it is written to the user's cache, without what only this processor could use.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from ..indexes.files import TEMPORARY
from .errors import CheckpointError

log = logging.getLogger(__name__)

_GRAPH, _WEIGHTS = "graph.onnx", "weights"
_IN_MEMORY = 1024  # bytes: smaller tensors are kept in the graph


def open_session(graph: Path, optimised: Path | None) -> Any:
    """Open a graph.

    Args:
        graph: an ONNX file.
        optimised: the folder of what was made of it, or will be; None keeps nothing.

    Raises:
        CheckpointError: ONNX Runtime cannot use the graph.
    """
    import onnxruntime as ort

    if optimised is not None and (optimised / _GRAPH).exists():
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        # A damaged one is made again.
        with contextlib.suppress(Exception):
            return _session(optimised / _GRAPH, options)
        shutil.rmtree(optimised, ignore_errors=True)
    try:
        if optimised is None:
            return _session(graph, ort.SessionOptions())
        return _optimise(graph, optimised)
    except Exception as error:  # ONNX Runtime's errors share no base
        raise CheckpointError(f"{graph} cannot be used: {error}") from error


def _optimise(graph: Path, folder: Path) -> Any:
    """Open a graph and write what ONNX Runtime made of it into a folder, whole or not at all."""
    import onnxruntime as ort

    partial = folder.with_name(f"{uuid.uuid4().hex}{TEMPORARY}")
    options = ort.SessionOptions()
    # The level above makes what only the same processor can use.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    prefix = "session.optimized_model_external_initializers"
    options.add_session_config_entry(f"{prefix}_file_name", _WEIGHTS)
    options.add_session_config_entry(f"{prefix}_min_size_in_bytes", str(_IN_MEMORY))
    options.optimized_model_filepath = str(partial / _GRAPH)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        log.debug("%s: graphs are optimised anew each time", error)
        return _session(graph, ort.SessionOptions())
    try:
        session = _session(graph, options)
        with contextlib.suppress(OSError):  # another process was quicker
            os.rename(partial, folder)
        return session
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _session(graph: Path, options: Any) -> Any:
    import onnxruntime as ort

    options.log_severity_level = 3  # errors; its warnings are about its own optimisations
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
