"""What an evaluation came to, and the published figures to stand beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .metrics import Interval

Table = dict[str, float]  # of `metrics.rank_statistics`
RECALLS = ("tr@1", "tr@5", "tr@10", "ir@1", "ir@5", "ir@10")

# BLIP-2 (arXiv 2301.12597), table 5: TR@1/5/10 and IR@1/5/10. Flickr30K zero-shot on its 1K test,
# COCO fine-tuned on its 5K test (Karpathy's splits).
PUBLISHED: Mapping[str, Mapping[str, tuple[float, ...]]] = {
    "flickr30k": {
        "CLIP ViT-L": (88.0, 98.7, 99.4, 68.7, 90.6, 95.2),
        "ALIGN": (88.6, 98.7, 99.7, 75.7, 93.8, 96.8),
        "BEiT-3": (94.9, 99.9, 100.0, 81.5, 95.6, 97.8),
        "ALBEF": (94.1, 99.5, 99.7, 82.8, 96.3, 98.1),
        "BLIP": (96.7, 100.0, 100.0, 86.7, 97.3, 98.7),
        "BLIP-2 ViT-L": (96.9, 100.0, 100.0, 88.6, 97.6, 98.9),
        "BLIP-2 ViT-g": (97.6, 100.0, 100.0, 89.7, 98.1, 98.9),
    },
    "coco": {
        "ALIGN": (77.0, 93.5, 96.9, 59.9, 83.3, 89.8),
        "BEiT-3": (84.8, 96.5, 98.3, 67.2, 87.7, 92.8),
        "ALBEF": (77.6, 94.3, 97.2, 60.7, 84.3, 90.5),
        "BLIP": (82.4, 95.4, 97.9, 65.1, 86.3, 91.8),
        "BLIP-2 ViT-L": (83.5, 96.0, 98.0, 66.3, 86.5, 91.8),
        "BLIP-2 ViT-g": (85.4, 97.0, 98.5, 68.3, 87.7, 92.6),
    },
}
PUBLISHED_SIZE = {"flickr30k": (1000, 5000), "coco": (5000, 25010)}  # images and captions


@dataclass(frozen=True, kw_only=True)
class Depth:
    """One depth of rerank, for a sweep; what it adds to the time of a text query."""

    table: Table
    itm_seconds: float  # ITM over the candidates, at the rate of the whole run
    seconds: float  # that, and decoding and encoding the candidates' files, as `query` does


@dataclass(frozen=True, kw_only=True)
class RetrievalReport:
    """The result of `evaluation.evaluate`.

    `tables` has "itc" and, where candidates were reranked, "itc+itm"; their entries are those of
    `metrics.rank_statistics`. `intervals` has the 95 % intervals of the recalls in the same order.
    """

    model: str
    fingerprint: str
    images: int
    captions: int
    rerank: int  # candidates a query; 0 is ITC alone
    precision: str  # of the rerank
    candidates: str  # "dense": every pair was compared; "index": they come from a stored index
    mean_query_cosine: float  # of an image's vectors: how alike they are
    tables: dict[str, Table]
    intervals: dict[str, dict[str, Interval]]
    seconds: dict[str, float]  # wall time of each stage
    rates: dict[str, float]  # images, texts and pairs a second
    skipped: tuple[str, ...] = ()  # why images were left out
    sweep: dict[int, Depth] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data: the tables come first, as {"itc": {"tr@1": ...}, "itc+itm": ...}."""
        data = asdict(self)
        tables: dict[str, Any] = data.pop("tables")
        return tables | data
