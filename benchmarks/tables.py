"""The tables of results in README.md and in the model card, made of `results/*.json`.

    python -m blip2_search.benchmarks.tables

A table stands between `<!-- NAME.json -->` (or `<!-- NAME.json sweep -->`) and `<!-- end -->`; a test
holds it to the file.
"""

from __future__ import annotations

import json
import re
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
