"""What the compiler knows about one attention block: plain data, no graph library.

A front end (``mla_pass.patterns``) reads a graph and describes every attention block as an :class:`AttentionSite`, or
says in a :class:`Refusal` why it could not. Folding reads the numbers (`Weight.read`), emission reads the handles
(`Handle`: an ``onnx_ir.Value`` or an ``fx.Node``). Names of dimensions used everywhere:

    B batch   S new tokens   P cached tokens   T = P + S   E hidden size
    H query heads   G kv groups (key/value heads)   R rotary dims
    D head size of queries and keys   V head size of values
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Handle = Any
"""A value of the graph the site was found in: ``onnx_ir.Value`` or ``torch.fx.Node``."""

Layout = Literal["BSE", "BSHD", "BHSD"]
"""How a value lays out its heads: packed [B, S, H*D], [B, S, H, D] or [B, H, S, D]."""


@dataclass(frozen=True)
class Weight:
    """A constant of the graph, or a cheap expression of constants (a slice of a packed weight, a transpose).

    Nothing is read before :meth:`read` is called, and nothing is kept after it: a model's weights stream through.
    """

    shape: tuple[int, ...]
    dtype: str
    """Name of the stored element type: float32, float16 or bfloat16."""
    read: Callable[[], np.ndarray]
    """Returns the array in float64, `shape` as above."""


@dataclass(frozen=True)
class Projection:
    """``y = x @ weight + bias`` with x [..., in], weight [in, out], bias [out]."""

    x: Handle
    weight: Weight
    bias: Weight | None


@dataclass(frozen=True)
class Norm:
    """RMS norm over the head size: ``y = x / sqrt(mean(x^2) + epsilon) * weight``, weight [D] (any 1 + w folded in)."""

    weight: Weight
    epsilon: float


@dataclass(frozen=True)
class Branch:
    """Query, key or value on its way from the hidden state to the attention, up to and without the rotation.

    `value` is the graph's value after projection and norm, before rope, before the cache and before repeat_kv.
    """

    projection: Projection
    norm: Norm | None
    value: Handle
    layout: Layout
    heads: int
    head_dim: int


@dataclass(frozen=True)
class Rope:
    """Rotation of the first `rotary_dim` of the head's numbers; pair i turns by ``theta[i] * position``.

    `theta` [R/2] in radians per position, float64, already scaled (linear, llama3, yarn: whatever the graph's own
    numbers say). `attention_scaling` multiplies both cos and sin (yarn, longrope). Half-split pairs are (i, i + R/2),
    interleaved pairs (2i, 2i + 1).
    """

    theta: np.ndarray
    rotary_dim: int
    interleaved: bool
    attention_scaling: float
    positions: Handle
    """int64 [B or 1, S]: the position of each new token."""


@dataclass(frozen=True)
class Cache:
    """The graph inputs and outputs that hold this layer's keys (rotated) and values, [B, G, P, D] and [B, G, T, D]."""

    past_key: Handle
    past_value: Handle
    present_key: Handle
    present_value: Handle


@dataclass(frozen=True)
class Mask:
    """Which keys a query may see.

    `causal`: row s is visible to row t if s <= t. `window` > 0: only if t - s < window as well (0: no window).
    `padding`: the graph's attention mask, handle of an int64 [B, T] input of zeros (hidden key) and ones, or None.
    `additive`: handle of the [B or 1, 1 or H, S, T] value that the graph adds to (or, boolean, selects in) the scores;
    when `kind` is "additive" nothing simpler describes it and it must be passed on as it is.
    """

    kind: Literal["structured", "additive"]
    causal: bool
    window: int
    padding: Handle | None
    additive: Handle | None


@dataclass(frozen=True)
class AttentionSite:
    """One attention block, from the hidden state to the input of the output projection.

    scores = softcap(scale * rope(q) . rope(k)) + mask; context = softmax(scores) @ v; `scale` is the product of all
    factors on the way (q side, k side, scores); `softcap` c > 0 means c * tanh(scores / c), 0 means none.
    """

    name: str
    """Path of the layer as the exporter tells it, e.g. ``model.layers.0.self_attn``."""
    layer: int
    query: Branch
    key: Branch
    value: Branch
    rope: Rope
    cache: Cache
    mask: Mask
    scale: float
    softcap: float
    context: Handle
    """The attention's result [B, S, H*V], the value that the output projection reads."""
    output: Projection
    """The output projection, weight [H*V, E]; its `x` is `context`."""
    dtype: str
    """Element type the graph computes the attention in: float32, float16 or bfloat16."""

    @property
    def heads(self) -> int:
        """Number of query heads, H."""
        return self.query.heads

    @property
    def kv_groups(self) -> int:
        """Number of key/value heads, G."""
        return self.key.heads

    @property
    def head_dim(self) -> int:
        """Size of a query and key head, D."""
        return self.key.head_dim

    @property
    def value_dim(self) -> int:
        """Size of a value head, V."""
        return self.value.head_dim

    @property
    def cache_width(self) -> int:
        """Numbers the original cache keeps per token in this layer: G * (D + V)."""
        return self.kv_groups * (self.head_dim + self.value_dim)

    def summary(self) -> str:
        """One line for people and golden tests."""
        bits = [f"{self.name}: H={self.heads} G={self.kv_groups} D={self.head_dim}"]
        if self.value_dim != self.head_dim:
            bits.append(f"V={self.value_dim}")
        rope = f"rope={self.rope.rotary_dim}{'i' if self.rope.interleaved else 'h'}"
        if self.rope.attention_scaling != 1.0:
            rope += f"*{self.rope.attention_scaling:.4g}"
        bits.append(rope)
        biases = "".join(
            letter
            for letter, branch in zip("qkv", (self.query, self.key, self.value), strict=True)
            if branch.projection.bias is not None
        ) + ("o" if self.output.bias is not None else "")
        if biases:
            bits.append(f"bias={biases}")
        norms = "".join(
            letter for letter, branch in zip("qkv", (self.query, self.key, self.value), strict=True) if branch.norm
        )
        if norms:
            bits.append(f"norm={norms}")
        mask: str = self.mask.kind if self.mask.kind == "additive" else ("causal" if self.mask.causal else "full")
        if self.mask.window:
            mask += f"+window{self.mask.window}"
        if self.mask.padding is not None:
            mask += "+padding"
        bits.append(f"mask={mask}")
        bits.append(f"scale={self.scale:.6g}")
        if self.softcap:
            bits.append(f"softcap={self.softcap:g}")
        bits.append(self.dtype)
        return " ".join(bits)


@dataclass(frozen=True)
class Refusal:
    """Why an attention block cannot be converted, in words a user can act on."""

    layer: str
    """Path or name of the layer, or of the anchor node when no path is known."""
    node: str
    """Name and op of the node where the walk stopped."""
    expected: str
    advice: str

    def __str__(self) -> str:
        return f"{self.layer}: stopped at {self.node}; expected {self.expected}; {self.advice}"
