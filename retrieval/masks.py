"""The three self-attention masks that make one Q-Former serve three objectives (BLIP-2, figure 2).

Rows attend to columns; True means "may attend". The sequence is the Q query tokens followed by the
T text tokens:

    objective            mask                      Q -> Q   Q -> T   T -> Q   T -> T
    ITC, contrastive     uni_modal_mask            yes      no       no       yes
    ITM, matching        bi_directional_mask       yes      yes      yes      yes
    ITG, generation      multimodal_causal_mask    yes      no       yes      past and itself

Padding is never attended to. Every function takes `num_queries` Q and `text_mask` (B, T), bool, True
where the text has a token, and returns (B, 1, Q + T, Q + T), bool, ready for
`scaled_dot_product_attention` (the 1 stands for the heads). Text alone is the case Q = 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def uni_modal_mask(num_queries: int, text_mask: Tensor) -> Tensor:
    """ITC: queries see queries, text sees text, neither sees the other."""
    return _assemble(num_queries, text_mask, query_to_text=False, text_to_query=False, causal=False)


def bi_directional_mask(num_queries: int, text_mask: Tensor) -> Tensor:
    """ITM: everything sees everything."""
    return _assemble(num_queries, text_mask, query_to_text=True, text_to_query=True, causal=False)


def multimodal_causal_mask(num_queries: int, text_mask: Tensor) -> Tensor:
    """ITG: text sees all queries and its own past; queries do not see the text."""
    return _assemble(num_queries, text_mask, query_to_text=False, text_to_query=True, causal=True)


def _assemble(
    num_queries: int, text_mask: Tensor, *, query_to_text: bool, text_to_query: bool, causal: bool
) -> Tensor:
    batch, num_text = text_mask.shape
    q = num_queries
    mask = text_mask.new_ones((batch, q + num_text, q + num_text), dtype=torch.bool)
    mask[:, :q, q:] = query_to_text
    mask[:, q:, :q] = text_to_query
    if causal:
        mask[:, q:, q:].tril_()
    mask[:, :, q:] &= text_mask.bool()[:, None, :]
    return mask[:, None]
