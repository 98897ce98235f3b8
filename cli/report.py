"""The tables and the picture of an evaluation."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..indexes.errors import Blip2SearchError
from . import render

if TYPE_CHECKING:
    from ..retrieval.judgements import JudgementReport
    from ..retrieval.report import RetrievalReport

MEANS = {"tr_mean": "TR mean", "ir_mean": "IR mean", "mean": "mean"}
TITLES = {"itc": "ITC", "itm": "ITM", "itc+itm": "ITC + ITM"}


def print_retrieval(result: RetrievalReport, dataset: str, split: str) -> None:
    """Print recalls with their intervals, further statistics, times, and the published rows."""
    how = "through its index" if result.candidates == "index" else "every pair compared"
    render.print_title(
        f"{dataset} {split}".strip()
        + f": {result.images:,} images, {result.captions:,} captions; {result.model}, {how}"
    )
    print_recalls([result], dataset, split)
    _print_ranks(result.tables)
    _print_times(result)


def print_recalls(results: Sequence[RetrievalReport], dataset: str, split: str) -> None:
    """Print the recalls of some models on one dataset, and the published rows under them."""
    from ..retrieval.report import PUBLISHED, PUBLISHED_SIZE, RECALLS

    first = results[0].tables["itc"]
    recalls = [name for name in RECALLS if name in first]
    means = [name for name in MEANS if name in first]
    columns = [name.upper() for name in recalls] + [MEANS[name] for name in means]
    table = render.new_table("", *columns, right=columns)
    for result in results:
        whose = f"{result.model}, " if len(results) > 1 else ""
        for name, row in result.tables.items():
            title = TITLES[name] + (f", {result.rerank} reranked" if name == "itc+itm" else "")
            table.add_row(whose + title, *(f"{row[column]:.1f}" for column in (*recalls, *means)))
            intervals = result.intervals[name]
            table.add_row("  95 % from", *(f"{intervals[column][0]:.1f}" for column in recalls))
            table.add_row("  to", *(f"{intervals[column][1]:.1f}" for column in recalls))
    whole = (results[0].images, results[0].captions) == PUBLISHED_SIZE.get(dataset)
    if whole and split == "test" and len(recalls) == 6:
        for name, figures in PUBLISHED[dataset].items():
            table.add_row(f"{name} (published)", *(f"{value:.1f}" for value in figures))
    render.print_table(table)


def _print_ranks(tables: Mapping[str, Mapping[str, float]]) -> None:
    for direction in ("tr", "ir"):
        found = [
            f"{TITLES[name]} {row[f'{direction}_median_rank']:g}, {row[f'{direction}_mrr']:.3f}"
            for name, row in tables.items()
            if f"{direction}_mrr" in row
        ]
        if found:
            render.print_title(f"{direction.upper()} median rank, MRR: " + "; ".join(found))


def _print_times(result: RetrievalReport) -> None:
    times = [f"{stage} {render.duration(seconds)}" for stage, seconds in result.seconds.items()]
    rates = [f"{rate:,.1f} {unit}/s" for unit, rate in result.rates.items()]
    render.print_title(f"time: {', '.join(times)} ({', '.join(rates)})")


def print_sweep(result: RetrievalReport) -> None:
    """Print recall and time against the depth of rerank."""
    if not result.sweep:
        return
    from ..retrieval.report import RECALLS

    first = next(iter(result.sweep.values()))
    recalls = [name for name in RECALLS if name in first.table]
    columns = ["rerank", *(name.upper() for name in recalls), "ITM ms", "with encoding ms"]
    table = render.new_table(*columns, right=columns)
    for depth, found in result.sweep.items():
        values = [f"{found.table[name]:.1f}" for name in recalls]
        times = [f"{1000 * seconds:,.0f}" for seconds in (found.itm_seconds, found.seconds)]
        table.add_row(str(depth), *values, *times)
    render.print_table(table)
    render.print_title(
        "ms: what the rerank adds to a text query; with encoding, where image tokens are not kept"
    )


def print_judgements(result: JudgementReport, name: str) -> None:
    """Print the agreement with people."""
    table = render.new_table("", "tau-b", "tau-c", right=["tau-b", "tau-c"])
    for score, taus in result.tau.items():
        values = [f"{100 * taus[tau]:.1f}" for tau in ("tau_b", "tau_c")]
        table.add_row(TITLES[score], *values)
    render.print_title(
        f"{name}: {result.pairs:,} pairs, {result.ratings:,} ratings; {result.model}; "
        "Kendall's tau x 100"
    )
    render.print_table(table)


def check_plotting(picture: Path) -> None:
    """Make sure, before the work, that the picture can be drawn.

    Raises:
        Blip2SearchError: matplotlib is not installed, or the file has another ending than .png.
    """
    if picture.suffix.lower() != ".png":
        raise Blip2SearchError(f"the picture is a PNG: --plot {picture.with_suffix('.png')}")
    if importlib.util.find_spec("matplotlib") is None:
        raise Blip2SearchError(
            "the sweep is drawn with matplotlib: pip install 'blip2-search[evaluate]'"
        )


def draw_sweep(result: RetrievalReport, picture: Path) -> None:
    """Draw recall against the depth of rerank and its time, as a PNG."""
    from matplotlib.figure import Figure

    depths = list(result.sweep)
    milliseconds = [1000 * found.itm_seconds for found in result.sweep.values()]
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    by_depth, by_time = figure.subplots(1, 2, sharey=True)
    for name in ("tr@1", "ir@1", "tr@10", "ir@10"):
        if name not in result.tables["itc"]:
            continue
        values = [found.table[name] for found in result.sweep.values()]
        by_depth.plot(range(len(depths)), values, marker="o", label=name.upper())
        by_time.plot(milliseconds, values, marker="o", label=name.upper())
    by_depth.set(xlabel="candidates reranked", ylabel="recall (%)", title=result.model)
    by_depth.set_xticks(range(len(depths)), [str(depth) for depth in depths])
    by_time.set(xlabel="ITM over the candidates of a text query (ms)", title="recall against time")
    for axes in (by_depth, by_time):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)
