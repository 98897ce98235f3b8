"""The curves of a training run, drawn from its log."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SMOOTHING = 0.95
LOSSES = {"itc": "ITC", "itm": "ITM", "itg": "ITG"}
RECALLS = ("tr@1", "tr@10", "ir@1", "ir@10")


def read_log(file: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the updates and the validations of a `log.jsonl`, each with its step.

    Of a step that was done twice, because a run was killed and resumed, the later entry counts.
    """
    updates: dict[int, dict[str, Any]] = {}
    validations: dict[int, dict[str, Any]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if "validation" in entry:
            validations[entry["step"]] = {"step": entry["step"], **entry["validation"]}
        elif "loss" in entry:
            updates[entry["step"]] = entry
    return (
        [updates[step] for step in sorted(updates)],
        [validations[step] for step in sorted(validations)],
    )


def draw_curves(log: Path, picture: Path) -> None:
    """Draw losses, recall in validation, and the rate of a run as a PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    updates, validations = read_log(log)
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    losses, recall, rate = figure.subplots(1, 3)
    steps = [entry["step"] for entry in updates]
    for name, label in LOSSES.items():
        values = [entry[name] for entry in updates if name in entry]
        if values:
            (line,) = losses.plot(steps, values, alpha=0.2)
            losses.plot(steps, _smoothed(values), color=line.get_color(), label=label)
    losses.set(title="Losses", xlabel="update", yscale="log")
    for name in RECALLS:
        if validations and name in validations[0]:
            points = [entry[name] for entry in validations]
            recall.plot([e["step"] for e in validations], points, marker=".", label=name.upper())
    recall.set(title="Validation, ITC recall (%)", xlabel="update")
    rate.plot(steps, [entry["lr"] for entry in updates], label="learning rate")
    rate.set(title="Learning rate and temperature", xlabel="update")
    temperature = rate.twinx()
    temperature.plot(
        steps, [e["temperature"] for e in updates], color="tab:orange", label="temperature"
    )
    rate.legend(handles=[*rate.get_lines(), *temperature.get_lines()], frameon=False)
    for axes in (losses, recall):
        if axes.get_lines():
            axes.legend(frameon=False)
        axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)


def _smoothed(values: Sequence[float]) -> list[float]:
    """Return the exponential moving average, corrected for its start."""
    smoothed, average = [], 0.0
    for i, value in enumerate(values, 1):
        average = SMOOTHING * average + (1 - SMOOTHING) * value
        smoothed.append(average / (1 - SMOOTHING**i))
    return smoothed
