"""A decoder-only transformer in the form of GPT-2 (Radford et al. 2019, "Language models are unsupervised multitask
learners"): Vaswani et al. 2017's attention, causal, with layer normalisation before each part."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class CausalSelfAttention(nn.Module):
    """Each position reads itself and those before it: softmax(Q K^T / sqrt(width / heads)) V, head by head."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        by_head = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [3, B, heads, T, head width]
        query, key, value = by_head.unbind()
        y = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.projection(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a two-layer perceptron of four times the width, each after a normalisation, beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = CausalSelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.gelu = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(self.gelu(self.fc1(self.norm2(x))))


class GPT(nn.Module):
    """Embeddings of tokens and positions, `layers` blocks, layer normalisation, linear layer to a logit per token.

    text_shape: (T,), tokens of an input; tokens: how many different ones there are. context: positions that have an
    embedding, at least T (None: T). Unlike GPT-2's, the last layer has a weight of its own, and nothing is dropped.
    Weights start from N(0, 0.02^2), those that add to the shortcut divided by sqrt(2 layers); biases from 0.
    """

    def __init__(
        self,
        text_shape: tuple[int],
        tokens: int,
        layers: int = 4,
        heads: int = 4,
        width: int = 128,
        context: int | None = None,
    ) -> None:
        super().__init__()
        (length,) = text_shape
        context = length if context is None else context
        for option, value in {"layers": layers, "heads": heads, "width": width}.items():
            if value < 1:
                raise ValueError(f"{option} must be at least 1, got {value}")
        if width % heads:
            raise ValueError(f"heads: must divide the width of {width}, got {heads}")
        if context < length:
            raise ValueError(f"context: must be at least the {length} of the data, got {context}")
        self.token_embedding = nn.Embedding(tokens, width)
        self.position_embedding = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, tokens, bias=False)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                adds = name.endswith(("attention.projection", "fc2"))
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * layers) if adds else 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, text: Tensor) -> Tensor:
        """Tokens int64 [B, T], T up to `context` -> logits [B, T, tokens] of the token that follows each."""
        positions = torch.arange(text.shape[1], device=text.device)
        x = self.token_embedding(text) + self.position_embedding(positions)
        return self.head(self.norm(self.blocks(x)))
