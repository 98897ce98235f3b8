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


def with_tables(page: str, results: Path = RESULTS) -> str:
    """Return a page with its tables as the results say."""

    def fill(match: re.Match[str]) -> str:
        result = json.loads((results / match["name"]).read_text(encoding="utf-8"))
        if match["sweep"]:
            return f"{match[1]}{sweep_table(result)}\n<!-- end -->"
        return (
            f"{match[1]}{recall_table(result)}\n\n{result['captions']:,} captions of "
            f"{result['images']:,} images, {result['date']}:\n\n    {result['command']}\n<!-- end -->"
        )

    return _TABLE.sub(fill, page)


def main() -> None:
    """Rewrite the tables."""
    for page in PAGES:
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
