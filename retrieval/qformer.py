"""The Q-Former: one BERT in which query tokens and text share self-attention (BLIP-2, section 3.1).

Only the query tokens look at the image, through cross-attention in every second layer; query tokens
and text have feed-forward weights of their own. What the two may see of each other is decided by a
mask from `masks.py`, so that the same weights serve ITC, ITM and ITG.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import QFormerConfig

KeyValue = tuple[Tensor, Tensor]  # each (B, heads, length, H / heads)


class QFormerOutput(NamedTuple):
    """What a pass through the Q-Former gives; the half that was not asked for is None."""

    queries: Tensor | None  # (B, Q, H)
    text: Tensor | None  # (B, T, H)
    query_keys_values: tuple[KeyValue, ...]  # one a layer, of the query half; () without queries


class Attention(nn.Module):
    """Multi-head attention with BERT's output projection, residual and LayerNorm."""

    def __init__(self, config: QFormerConfig, source_size: int) -> None:
        """Attend from hidden states (H) to a source of `source_size` channels."""
        super().__init__()
        hidden = config.hidden_size
        self.num_heads = config.num_heads
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(source_size, hidden)
        self.value = nn.Linear(source_size, hidden)
        self.output = nn.Linear(hidden, hidden)
        self.norm = nn.LayerNorm(hidden, eps=config.norm_eps)
        self.dropout = config.dropout
        self.attention_dropout = config.dropout

    def keys_values(self, source: Tensor) -> KeyValue:
        """Project a source (B, S, source_size) to keys and values (B, heads, S, H / heads)."""
        return self._split(self.key(source)), self._split(self.value(source))

    def forward(self, hidden: Tensor, keys_values: KeyValue, mask: Tensor | None) -> Tensor:
        """Return (B, L, H) for hidden (B, L, H); `mask` broadcasts to (B, heads, L, S)."""
        context = F.scaled_dot_product_attention(
            self._split(self.query(hidden)),
            *keys_values,
            attn_mask=mask,
            dropout_p=self.attention_dropout if self.training else 0.0,
        )
        context = context.transpose(1, 2).flatten(2)  # (B, L, H)
        context = F.dropout(self.output(context), self.dropout, self.training)
        normed: Tensor = self.norm(hidden + context)
        return normed

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.num_heads, -1).transpose(1, 2)


class FeedForward(nn.Module):
    """BERT's feed-forward block with residual and LayerNorm."""

    def __init__(self, config: QFormerConfig) -> None:
        """Build H -> ffn_size -> H."""
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.ffn_size)
        self.down = nn.Linear(config.ffn_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (B, L, H) to (B, L, H)."""
        out: Tensor = self.norm(hidden + self.dropout(self.down(F.gelu(self.up(hidden)))))
        return out


class QFormerLayer(nn.Module):
    """Shared self-attention, cross-attention for the queries, a feed-forward block for each half."""

    def __init__(self, config: QFormerConfig, *, cross_attention: bool) -> None:
        """Build one layer, with cross-attention to the image or without."""
        super().__init__()
        self.self_attention = Attention(config, config.hidden_size)
        self.cross_attention = (
            Attention(config, config.image_token_size) if cross_attention else None
        )
        self.query_ffn = FeedForward(config)
        self.text_ffn = FeedForward(config)

    def forward(
        self,
        queries: Tensor | None,
        text: Tensor | None,
        image: KeyValue | None,
        mask: Tensor | None,
        past: KeyValue | None,
        image_of: Tensor | None,
        text_of: Tensor | None,
        *,
        queries_only: bool,
    ) -> tuple[Tensor | None, Tensor | None, KeyValue]:
        """Return the two halves, (B, Q, H) and (B, T, H), and the keys and values of this layer.

        `image` are what `cross_attention.keys_values` makes of the image tokens.
        `past` are the keys and values of a query half that was computed before; the text then
        attends to them as if the queries stood in front of it. With `queries_only` the queries
        attend to the text, and nothing else is computed of it: None. Until the queries look at the
        image all is the texts' alone: with `text_of` that is computed of each text once.
        """
        num_queries = 0 if queries is None else queries.shape[1]
        hidden = torch.cat([half for half in (queries, text) if half is not None], dim=1)
        keys_values = self.self_attention.keys_values(hidden)
        seen = keys_values
        if past is not None:
            seen = (
                torch.cat((past[0], keys_values[0]), dim=2),
                torch.cat((past[1], keys_values[1]), dim=2),
            )
        if queries_only:
            hidden, text = hidden[:, :num_queries], None
            mask = None if mask is None else mask[:, :, :num_queries]
        hidden = self.self_attention(hidden, seen, mask)
        if text is not None:
            text = self.text_ffn(hidden[:, num_queries:])
            text = text if text_of is None else text[text_of]
        if queries is not None:
            queries = hidden[:, :num_queries]
            queries = queries if text_of is None else queries[text_of]
            if self.cross_attention is not None and image is not None:
                if image_of is not None:
                    image = image[0][image_of], image[1][image_of]
                queries = self.cross_attention(queries, image, None)
            queries = self.query_ffn(queries)
        return queries, text, keys_values


class LanguageModelHead(nn.Module):
    """BERT's prediction head: a transform, then the word embeddings as the decoder (tied)."""

    def __init__(self, config: QFormerConfig) -> None:
        """Build the transform and the decoder's bias; the decoder's weight is passed in."""
        super().__init__()
        self.transform = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor, word_embeddings: Tensor) -> Tensor:
        """Map (..., H) to logits (..., vocabulary)."""
        return F.linear(self.norm(F.gelu(self.transform(hidden))), word_embeddings, self.bias)


class QFormer(nn.Module):
    """The Querying Transformer."""

    def __init__(self, config: QFormerConfig) -> None:
        """Build the network with BERT's initialisation (normal, 0.02)."""
        super().__init__()
        self.config = config
        hidden = config.hidden_size
        self.query_tokens = nn.Parameter(torch.empty(config.num_queries, hidden))
        self.word_embeddings = nn.Embedding(config.vocab_size, hidden)
        self.position_embeddings = nn.Embedding(config.max_positions, hidden)
        self.embedding_norm = nn.LayerNorm(hidden, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            QFormerLayer(config, cross_attention=i % config.cross_attention_every == 0)
            for i in range(config.num_layers)
        )
        nn.init.normal_(self.query_tokens, std=0.02)
        self.apply(_initialise)

    def set_attention_dropout(self, probability: float) -> None:
        """Drop other attention weights in training than the configuration says."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.attention_dropout = probability

    def image_keys_values(self, image_tokens: Tensor) -> Iterator[KeyValue | None]:
        """Give what each layer's cross-attention makes of (B, P, D), None where it has none."""
        for layer in self.layers:
            assert isinstance(layer, QFormerLayer)
            attention = layer.cross_attention
            yield None if attention is None else attention.keys_values(image_tokens)

    def forward(
        self,
        *,
        image_tokens: Tensor | None = None,
        image_keys_values: Iterable[KeyValue | None] | None = None,
        token_ids: Tensor | None = None,
        mask: Tensor | None = None,
        past: Sequence[KeyValue] = (),
        image_of: Tensor | None = None,
        text_of: Tensor | None = None,
        queries_only: bool = False,
    ) -> QFormerOutput:
        """Run the query half, the text half, or both.

        Args:
            image_tokens: (B, P, D), float; given, the query tokens take part.
            image_keys_values: of `image_keys_values`, in place of `image_tokens`, for a text each; a
                layer's are taken when it is reached.
            token_ids: (B, T), int64; given, the text takes part.
            mask: from `masks.py`, (B, 1, L, S) with L the length of what takes part and S that of
                what it attends to; None lets everything see everything.
            past: `query_keys_values` of an earlier pass over the same images, in place of
                `image_tokens`; the mask's rows are then the text's alone.
            image_of: (B,), int64; `image_tokens` are then (N, P, D), and it tells which of the N
                each text comes with. Their keys and values are projected once.
            text_of: (B,), int64; `token_ids` (M, T) and the mask are then those of M texts, and it
                tells which of the M each of the batch takes. What no image touches is computed once.
            queries_only: leave out the text's part of the last layer, which no query sees.

        Raises:
            ValueError: neither half was given.
        """
        queries = text = None
        like = image_tokens if token_ids is None else token_ids
        if like is None:
            raise ValueError("the Q-Former needs image tokens, text tokens, or both")
        if image_tokens is not None or image_keys_values is not None:
            # Not len(): an export would take the size of its example for a constant.
            queries = self.query_tokens.expand(like.shape[0], -1, -1)
            queries = self.dropout(self.embedding_norm(queries))
        if token_ids is not None:
            positions = self.position_embeddings.weight[: token_ids.shape[1]]
            text = self.dropout(self.embedding_norm(self.word_embeddings(token_ids) + positions))
        images = repeat(None) if image_keys_values is None else image_keys_values
        if image_tokens is not None:
            images = self.image_keys_values(image_tokens)
        keys_values = []
        for i, (layer, image) in enumerate(zip(self.layers, images, strict=False)):
            queries, text, layer_kv = layer(
                queries, text, image, mask, past[i] if past else None, image_of, text_of,
                queries_only=queries_only and i == len(self.layers) - 1,
            )  # fmt: skip
            if text_of is not None:  # from here on each of the batch has its own
                mask, text_of = None if mask is None else mask[text_of], None
            keys_values.append(layer_kv)
        # Reusable only from a pass over the queries alone: then no text has touched them.
        reusable = tuple(keys_values) if token_ids is None else ()
        return QFormerOutput(queries, text, reusable)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
