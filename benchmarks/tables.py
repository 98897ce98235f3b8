"""The tables of results in README.md and in the model card, made of `results/*.json`.

    python -m blip2_search.benchmarks.tables

A table stands between `<!-- NAME.json -->` (or `<!-- NAME.json sweep -->`) and `<!-- end -->`; a test
holds it to the file.
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

from ..retrieval.report import RECALLS
from .recall import RESULTS

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "retrieval" / "models" / "mini" / "README.md")
_TABLE = re.compile(r"(<!-- (?P<name>\S+\.json)(?P<sweep> sweep)? -->\n).*?<!-- end -->", re.DOTALL)


def recall_table(result: dict[str, Any]) -> str:
    """Return a result's recalls as a table in Markdown, and what it takes to get them again."""
    columns = [name.upper() for name in RECALLS]
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, title in (
        ("itc", "ITC alone"),
        ("itc+itm", f"ITC + ITM, {result['rerank']} reranked"),
    ):
        if name in result:
            values = " | ".join(f"{result[name][recall]:.1f}" for recall in RECALLS)
            lines.append(f"| {title} | {values} |")
    return "\n".join(lines)


def sweep_table(result: dict[str, Any]) -> str:
    """Return recall and time against the depth of rerank, as a table in Markdown."""
    columns = [
        "candidates reranked",
        *(name.upper() for name in RECALLS),
        "ITM, ms a query",
        "with encoding",
    ]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for depth, found in result["sweep"].items():
        values = [f"{found['table'][recall]:.1f}" for recall in RECALLS]
        values += [f"{1000 * found[time]:,.0f}" for time in ("itm_seconds", "seconds")]
        lines.append(f"| {depth} | {' | '.join(values)} |")
    return "\n".join(lines)


def tradeoff_table(result: dict[str, Any]) -> str:
    """Return what indexes cost and lose beside each other, as a table in Markdown."""
    rows, deepest = result["results"], f"recall@{result['k']}"
    baseline = next(iter(rows.values()))["p50_ms"]
    columns = [
        f"{result['images']:,} images",
        "ms a query, p50", "p95", "times as fast", "bytes an image in memory", "on disk",
        "recall@10", deepest,
    ]  # fmt: skip
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for name, row in rows.items():
        values = [
            f"{row['p50_ms']:.1f}", f"{row['p95_ms']:.1f}", f"{baseline / row['p50_ms']:.1f}",
            f"{row['bytes_an_image']:,.0f}", f"{row['disk_bytes_an_image']:,.0f}",
            f"{row['recall@10']:.4f}", f"{row[deepest]:.4f}",
        ]  # fmt: skip
        lines.append(f"| {name} | {' | '.join(values)} |")
    return "\n".join(lines)


def growth_table(result: dict[str, Any]) -> str:
    """Return what an index costs at several sizes, as a table in Markdown."""
    rows = result["rows"]
    titles = {
        "exact_open_s": ("exact: open, s", "{:.3f}"),
        "exact_p50_ms": ("exact: a query, ms", "{:.0f}"),
        "compact_open_s": ("compact: open, s", "{:.3f}"),
        "compact_p50_ms": ("compact: a query, ms", "{:.0f}"),
        "recall@128": ("compact: recall@128", "{:.4f}"),
        "add_1000_s": ("add 1,000 images, s", "{:.1f}"),
    }
    sizes = [f"{row['images']:,} images" for row in rows]
    lines = ["| | " + " | ".join(sizes) + " | grows as |", "|---" * (len(rows) + 2) + "|"]
    for name, (title, form) in titles.items():
        values = [form.format(row[name]) for row in rows]
        exponent = result["exponents"].get(name)
        power = "" if exponent is None else f"N^{exponent:.2f}"
        lines.append(f"| {title} | {' | '.join(values)} | {power} |")
    return "\n".join(lines)


KEPT = "transformers, its images kept by hand"  # the contender of `inference` that has done most


def inference_table(result: dict[str, Any]) -> str:
    """Return pairs and images a second, ours beside transformers', as a table in Markdown."""
    lines = [
        "| | | a second | times transformers | times that with images kept |",
        "|---" * 5 + "|",
    ]
    for work, contenders in result["seconds"].items():
        first = next(iter(contenders.values()))
        for name, seconds in contenders.items():
            ratio = f"{times_as_fast(contenders[KEPT], seconds):.1f}" if KEPT in contenders else ""
            rate = f"{1 / statistics.median(seconds):.2f}"
            lines.append(
                f"| {work} | {name} | {rate} | {times_as_fast(first, seconds):.1f} | {ratio} |"
            )
            work = ""
    return "\n".join(lines)


def indexing_table(result: dict[str, Any]) -> str:
    """Return images a second of the indexer and of a plain loop, as a table in Markdown."""
    lines = ["| | images a second | times as fast | encoder busy |", "|---" * 4 + "|"]
    loop = next(iter(result["seconds"].values()))
    for name, seconds in result["seconds"].items():
        rate = result["images"] / statistics.median(seconds)
        shares = result["busy"].get(name)
        share = f"{statistics.median(shares):.0%}" if shares else ""
        lines.append(f"| {name} | {rate:.1f} | {times_as_fast(loop, seconds):.2f} | {share} |")
    return "\n".join(lines)


PEAK = "one large matrix product"  # what the works of `peak` are held against


def peak_table(result: dict[str, Any]) -> str:
    """Return images and pairs a second, and how near to the peak that is, as a table in Markdown."""
    lines = ["| | a second | GFLOP each | TFLOP/s | share of peak |", "|---" * 5 + "|"]
    for name, work in result["works"].items():
        rate, share = 1 / statistics.median(work["seconds"]), share_of_peak(result["works"], name)
        values = [f"{rate:,.1f}", f"{work['flops'] / 1e9:,.1f}"]
        values += [f"{rate * work['flops'] / 1e12:.3f}", f"{share:.0%}"]
        lines.append(f"| {name} | {' | '.join(values)} |")
    return "\n".join(lines)


def share_of_peak(works: dict[str, Any], name: str) -> float:
    """Return FLOP/s of a work by those of the large matrix product, the median of the rounds."""
    peak, work = works[PEAK], works[name]
    share: float = times_as_fast(peak["seconds"], work["seconds"]) * work["flops"] / peak["flops"]
    return share


def int8_table(result: dict[str, Any]) -> str:
    """Return images a second and recall of the encoder in fp32 and in int8, in Markdown."""
    columns = ["encoder", "images a second", "times as fast", *(name.upper() for name in RECALLS)]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    first = result["precisions"]["fp32"]["seconds"]
    for name, found in result["precisions"].items():
        rate = result["batch"] / statistics.median(found["seconds"])
        values = [f"{rate:.1f}", f"{times_as_fast(first, found['seconds']):.2f}"]
        values += [f"{found[recall]:.1f}" for recall in RECALLS]
        lines.append(f"| {name} | {' | '.join(values)} |")
    return "\n".join(lines)


def queries_table(result: dict[str, Any]) -> str:
    """Return the times of commands, and of queries in a program that stays, in Markdown."""
    lines = [f"| {result['images']:,} images, a process a command | s, median | least |"]
    lines += ["|---|---|---|"]
    for name, seconds in result["cold_s"].items():
        lines.append(f"| {name} | {statistics.median(seconds):.2f} | {min(seconds):.2f} |")
    depths = [key for key in result["warm"][0] if key.isdigit()]
    columns = [f"rerank {depth}: ms, p50 (p95)" for depth in depths]
    lines += ["", "| a program that stays | " + " | ".join(columns) + " |"]
    lines += ["|---" * (len(depths) + 1) + "|"]
    for found in result["warm"]:
        times = [
            f"{found[depth]['p50_ms']:.0f} ({found[depth]['p95_ms']:.0f})" if depth in found else ""
            for depth in depths
        ]
        lines.append(f"| {found['images']:,} images | {' | '.join(times)} |")
    return "\n".join(lines)


def times_as_fast(theirs: list[float], ours: list[float]) -> float:
    """Return how many times as fast ours is: the median of the ratios of neighbours."""
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


_SPEED = {
    "vision_layers": inference_table,
    "busy": indexing_table,
    "cold_s": queries_table,
    "precisions": int8_table,
    "works": peak_table,
}


def with_tables(page: str, results: Path = RESULTS) -> str:
    """Return a page with its tables as the results say."""

    def fill(match: re.Match[str]) -> str:
        result = json.loads((results / match["name"]).read_text(encoding="utf-8"))
        if match["sweep"]:
            table = sweep_table(result)
        elif "results" in result:
            table = tradeoff_table(result)
        elif "rows" in result:
            table = growth_table(result)
        elif kind := next((key for key in _SPEED if key in result), None):
            table = _SPEED[kind](result)
        else:
            table = (
                f"{recall_table(result)}\n\n{result['captions']:,} captions of "
                f"{result['images']:,} images, {result['date']}:\n\n    {result['command']}"
            )
        return f"{match[1]}{table}\n<!-- end -->"

    return _TABLE.sub(fill, page)


def main() -> None:
    """Rewrite the tables."""
    for page in PAGES:
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
