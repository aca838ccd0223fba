"""The decoder of Group-Free-3D (Liu et al., 2021): object queries attend to one another and to the seeds, post-norm."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from tokenfusion.backbones.block import multi_head
from tokenfusion.backbones.pointnet2 import Pointwise


class Attention(nn.Module):
    """Multi-head attention whose keys are its values: to ``x`` itself or to a context."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """``x [B, Q, C]``, ``context [B, S, C]`` -> ``[B, Q, C]``."""
        dim = x.shape[-1]
        if context is None:
            q, k, v = self.qkv(x).split(dim, -1)
        else:
            weight, bias = self.qkv.weight, self.qkv.bias
            q = F.linear(x, weight[:dim], bias[:dim])
            k, v = F.linear(context, weight[dim:], bias[dim:]).split(dim, -1)
        return self.proj(multi_head(q, k, v, self.heads, dropout=self.dropout if self.training else 0.0))


class PositionEmbedding(nn.Module):
    """Learned embedding of a place, ``[B, N, inputs] -> [B, N, dim]``: xyz in metres, or centre and size of a box."""

    def __init__(self, inputs: int, dim: int, momentum: float) -> None:
        super().__init__()
        self.hidden = Pointwise(inputs, dim, True, momentum)
        self.out = nn.Linear(dim, dim)

    def forward(self, place: Tensor) -> Tensor:
        return self.out(self.hidden(place))


class DecoderLayer(nn.Module):
    """Self-attention of the queries, cross-attention to the seeds, MLP; positions enter keys, queries and values alike."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float, momentum: float) -> None:
        super().__init__()
        self.self_position = PositionEmbedding(6, dim, momentum)
        self.cross_position = PositionEmbedding(3, dim, momentum)
        self.self_attention = Attention(dim, heads, dropout)
        self.cross_attention = Attention(dim, heads, dropout)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.drop = nn.Dropout(dropout)

    def forward(
        self, query: Tensor, key: Tensor, box: Tensor, xyz: Tensor, fuse: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """``query [B, Q, C]`` and their boxes so far ``[B, Q, 6]``, ``key [B, S, C]`` at ``xyz [B, S, 3]`` -> ``[B, Q, C]``.

        ``fuse [B, Q, C] -> [B, Q, C]`` changes what the queries have read from the keys before it is added to them.
        """
        position = self.self_position(box)
        query = self.norm1(query + self.drop(self.self_attention(query + position)))
        context = key + self.cross_position(xyz)
        read = self.cross_attention(query + position, context)
        query = self.norm2(query + self.drop(read if fuse is None else fuse(read)))
        hidden = self.drop(F.relu(self.fc1(query)))
        return self.norm3(query + self.drop(self.fc2(hidden)))


def initialise(decoder: nn.Module) -> None:
    """Xavier-uniform on every matrix, as published."""
    for parameter in decoder.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
