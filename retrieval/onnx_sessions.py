"""Graphs of ONNX Runtime, opened: optimised once on a machine, and memory-mapped from then on.

What ONNX Runtime makes of a graph when it opens it, it would make again in each process: most of the
time of a first answer. So it is written to the user's cache, without what only this processor could use:

    FOLDER/GRAPH-DIGEST-VERSION/graph.onnx, weights     of the graph's bytes, and ONNX Runtime's version
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from ..indexes.files import TEMPORARY, sync_folder
from .errors import BackendError, CheckpointError

log = logging.getLogger(__name__)

_GRAPH, _WEIGHTS = "graph.onnx", "weights"
SMALL = 1024  # bytes: smaller tensors are kept in a graph


def open_session(graph: Path, kept: Path | None, threads: int = 0) -> Any:
    """Open a graph.

    Args:
        graph: an ONNX file.
        kept: the folder in which to keep what is made of it, used for graphs of one model alone; None
            keeps nothing, and optimises for this very processor.
        threads: how many compute; 0 is one a core.

    Raises:
        BackendError: ONNX Runtime cannot be loaded.
        CheckpointError: it cannot use the graph.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise BackendError(f"ONNX Runtime cannot be loaded ({error}): --backend torch") from error
    try:
        if kept is None:
            options = ort.SessionOptions()
            options.intra_op_num_threads = threads
            return _session(graph, options)
        return _optimised(graph, kept, ort.__version__)
    except Exception as error:  # ONNX Runtime's errors share no base
        raise CheckpointError(f"{graph} cannot be used: {error}") from error


def _optimised(graph: Path, kept: Path, version: str) -> Any:
    """Open what was made of a graph; make it first where it is missing or damaged."""
    import onnxruntime as ort

    digest = hashlib.blake2b(graph.read_bytes(), digest_size=8).hexdigest()
    folder = kept / f"{graph.stem}-{digest}-{version}"
    if folder.exists():
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            return _session(folder / _GRAPH, options)
        except Exception as error:
            log.warning("%s is damaged and made again: %s", folder, error)
            shutil.rmtree(folder, ignore_errors=True)
    try:
        return _optimise(graph, folder)
    except Exception as error:  # such as a full disk
        log.warning("queries start more slowly, as %s cannot be written: %s", folder, error)
        return _session(graph, ort.SessionOptions())


def _optimise(graph: Path, folder: Path) -> Any:
    """Open a graph and write what ONNX Runtime made of it into a folder, whole or not at all."""
    import onnxruntime as ort

    partial = folder.with_name(f"{uuid.uuid4().hex}{TEMPORARY}")
    options = ort.SessionOptions()
    # The level above makes what only the same processor can use.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    prefix = "session.optimized_model_external_initializers"
    options.add_session_config_entry(f"{prefix}_file_name", _WEIGHTS)
    options.add_session_config_entry(f"{prefix}_min_size_in_bytes", str(SMALL))
    options.optimized_model_filepath = str(partial / _GRAPH)
    try:
        partial.mkdir(parents=True)
        session = _session(graph, options)
        for file in partial.iterdir():  # a power cut must not leave zeros under the final name
            with open(file, "rb+") as written:
                os.fsync(written.fileno())
        for old in folder.parent.glob(f"{graph.stem}-*"):  # of another version, or of other graphs
            shutil.rmtree(old, ignore_errors=True)
        try:
            os.rename(partial, folder)
            sync_folder(folder.parent)
        except OSError:
            if not folder.exists():  # else another process was quicker
                raise
        return session
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _session(graph: Path, options: Any) -> Any:
    import onnxruntime as ort

    options.log_severity_level = 3  # errors; its warnings are about its own optimisations
    # Its threads would go on looking for work, on cores that decoding and searching need.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
