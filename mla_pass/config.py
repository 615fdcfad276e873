"""What a conversion is asked to do: one frozen, versioned value that travels with the converted model."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self, get_args

from mla_pass.errors import MlaPassError

RopeMode = Literal["block", "extend", "repeat"]
Absorb = Literal["auto", "always", "never"]
CacheKind = Literal["shared", "growing"]
Target = Literal["mla-pass", "ort-latent"]
Layout = Literal["plain", "genai"]
Layers = Literal["loss", "even"]
CacheDtype = Literal["same", "float16", "bfloat16", "int8", "float8", "auto"]
RopeDtype = Literal["auto", "same", "float16", "bfloat16", "int8", "float8"]
MetricKind = Literal["auto", "output", "fisher"]
FORMAT_VERSION = 7


@dataclass(frozen=True)
class MlaConfig:
    """Options of a conversion; every field has a default that suits most models.

    Raises MlaPassError when a value is out of its range.
    """

    budget: float = 0.5
    """Cached bytes per token and layer, as a fraction of the original cache's; in (0, 1]."""
    rank: int | None = None
    """Width of the latent; with `rope_dims` it replaces `budget`."""
    rope_dims: int | None = None
    """Numbers of the row that keep their own rotation; even; chosen automatically when None."""
    rope_mode: RopeMode = "block"
    """What happens to the rotation of the keys in the latent: `block` turns it block by block on the query's side
    (math: block-rotary absorption), `extend` leaves it off (the decoupled form), `repeat` caches every key component
    rotated and compresses only the values."""
    absorb: Absorb = "auto"
    """Fold the up-projections into the query and output projections: where that means fewer numbers to read, wherever
    the algebra allows it, or never."""
    cache: CacheKind = "shared"
    """`shared`: present has the shape of past, a buffer with room to spare, written in place where the runtime binds
    one buffer to both. `growing`: present is past with the new rows appended."""
    target: Target = "mla-pass"
    """What a block becomes: `mla-pass`, our LatentAttention; `ort-latent`, ONNX Runtime's own PagedAttention over pages
    of latents, in 16 bits and on CUDA alone, for servers that page their cache. It turns no blocks: its rope_mode is
    `extend` or `repeat`."""
    layout: Layout = "plain"
    """How a row lies in its two cache tensors: `plain`, latent and rotated part; `genai`, two halves of one shape and
    type, which is what onnxruntime-genai can keep."""
    cache_dtype: CacheDtype = "same"
    """Type the latents are stored in: the model's own, 16 bits, 8 bits with a scale for each quarter of a row (`int8`,
    whole numbers, or `float8`, E4M3 numbers, which are coarser), or `auto`: of the model's own and int8 what loses less
    at equal bytes on held-out text."""
    rope_dtype: RopeDtype = "auto"
    """Type the rotated part of a row is stored in; `auto` is as the latent, but 16 bits beside 8-bit latents."""
    layers: Layers = "loss"
    """`loss`: layers get what lowers the predicted loss most; `even`: all layers of one shape get the same."""
    max_loss: float | None = None
    """Instead of `budget`: the smallest cache whose measured excess loss, in nats per token on text held out from
    calibration, is at most this."""
    attention_flops: float = 2.0
    """Most multiply-adds of the absorbed attention, as a multiple of the same without block rotation."""
    finest_block: int | None = None
    """Rows per block of the finest rotary band, a power of two; None chooses it for each layer."""
    block_order: int | None = None
    """0 or 1: whether a row's offset within its block is followed to first order; None chooses it for each layer."""
    band_angle: float = 1.0
    """Largest angle, in radians, that a band's pair may turn within one block, unless the finest block exceeds it."""
    turn_all: bool = False
    """Leave no pair's rotation off, though a constant may stand for the fastest ones at less arithmetic: what an
    attention that is not ours, with a cache of ours, needs."""
    metric: MetricKind = "auto"
    """What the loss is predicted with: `output` (the blocks' output errors, from forward passes), `fisher` (the model's
    loss, from gradients; needs torch), or `auto`, `fisher` where torch is installed."""
    metric_mix: float | None = None
    """Weight of the balanced identity that is mixed into the metric; None chooses it on held-out calibration text."""
    calibrate_tokens: int = 8192
    """Tokens of calibration text."""
    calibrate_context: int = 512
    """Length of the sequences the calibration text is cut into."""
    calibrate_self: float = 0.5
    """Share of them that the model writes itself beside a text that is given: it keeps what that text does not show."""
    max_positions: int | None = None
    """Rows of the rotary table; None takes the model's own limit, or 32768 where the graph does not tell."""
    partial: bool = False
    """Convert the blocks that can be read even if some cannot."""

    def __post_init__(self) -> None:
        """Reject values out of range."""
        if not 0.0 < self.budget <= 1.0:
            raise MlaPassError(f"budget must lie in (0, 1], a fraction of the original cache; got {self.budget}")
        if self.rank is not None and self.rank < 1:
            raise MlaPassError(f"rank must be at least 1; got {self.rank}")
        if self.rope_dims is not None and (self.rope_dims < 2 or self.rope_dims % 2):
            raise MlaPassError(f"rope_dims must be an even number of at least 2; got {self.rope_dims}")
        for name, kind in (("rope_mode", RopeMode), ("absorb", Absorb), ("cache", CacheKind),
                           ("target", Target), ("layout", Layout), ("cache_dtype", CacheDtype),
                           ("rope_dtype", RopeDtype), ("layers", Layers), ("metric", MetricKind)):  # fmt: skip
            if getattr(self, name) not in get_args(kind):
                raise MlaPassError(f"{name} must be one of {', '.join(get_args(kind))}; got {getattr(self, name)!r}")
        if self.finest_block is not None and (self.finest_block < 1 or self.finest_block & (self.finest_block - 1)):
            raise MlaPassError(f"finest_block must be a power of two; got {self.finest_block}")
        if self.block_order not in (None, 0, 1):
            raise MlaPassError(f"block_order must be 0 or 1; got {self.block_order}")
        if not self.band_angle > 0:
            raise MlaPassError(f"band_angle must be positive; got {self.band_angle}")
        if self.metric_mix is not None and not self.metric_mix >= 0:
            raise MlaPassError(f"metric_mix must be at least 0; got {self.metric_mix}")
        if not self.attention_flops >= 1:
            raise MlaPassError(f"attention_flops must be at least 1; got {self.attention_flops}")
        if self.max_loss is not None and not self.max_loss > 0:
            raise MlaPassError(f"max_loss must be positive, in nats per token; got {self.max_loss}")
        if self.max_loss is not None and self.rank is not None:
            raise MlaPassError("max_loss chooses the sizes itself; give it without rank")
        if self.cache_dtype == "auto" and self.rank is not None:
            raise MlaPassError("cache_dtype auto compares types at equal bytes; give it without rank, or name a type")
        if self.layout == "genai" and self.rope_dtype not in ("auto", self.cache_dtype):
            raise MlaPassError(
                f"layout genai keeps a row in two halves of one type; rope_dtype {self.rope_dtype} beside cache_dtype "
                f"{self.cache_dtype} makes two: leave rope_dtype at auto"
            )
        if self.layout == "genai" and self.rank is not None and self.rank % 2:
            raise MlaPassError(f"layout genai cuts a row into two halves: rank must be even; got {self.rank}")
        if self.target == "ort-latent":
            self._check_paged()
        if self.turn_all and self.rope_mode != "block":
            raise MlaPassError(f"turn_all says how blocks are laid out; rope_mode {self.rope_mode!r} has none")
        if self.calibrate_context < 2 or self.calibrate_tokens < self.calibrate_context:
            raise MlaPassError(
                f"calibrate_tokens must be at least calibrate_context, and that at least 2; "
                f"got {self.calibrate_tokens} and {self.calibrate_context}"
            )
        if not 0 <= self.calibrate_self <= 1:
            raise MlaPassError(f"calibrate_self must lie in [0, 1], a share of the text; got {self.calibrate_self}")
        if self.max_positions is not None and self.max_positions < 1:
            raise MlaPassError(f"max_positions must be at least 1; got {self.max_positions}")

    def _check_paged(self) -> None:
        """Raises MlaPassError for what ONNX Runtime's PagedAttention cannot do."""
        if self.rope_mode == "block":
            raise MlaPassError(
                "target ort-latent cannot turn the keys in the latent block by block; choose rope_mode 'extend', which "
                "leaves their rotation off, or 'repeat'"
            )
        if self.cache_dtype not in ("same", "float16", "bfloat16") or self.rope_dtype not in ("auto", self.cache_dtype):
            raise MlaPassError(
                f"target ort-latent keeps a row in one tensor of 16 bits; got cache_dtype {self.cache_dtype} and "
                f"rope_dtype {self.rope_dtype}: choose cache_dtype same, float16 or bfloat16, and leave rope_dtype at "
                "auto"
            )
        if self.layout != "plain" or self.partial:
            refused = "partial" if self.partial else f"layout {self.layout}"
            raise MlaPassError(f"target ort-latent pages every layer's rows in one tensor each; leave {refused} out")

    def to_json(self) -> dict[str, Any]:
        """Plain data for a JSON file, with the format version."""
        return {"format_version": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, data: dict[str, Any] | str) -> Self:
        """Read what :meth:`to_json` wrote. Raises MlaPassError for another version or an unknown field."""
        values = dict(json.loads(data) if isinstance(data, str) else data)
        version = values.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise MlaPassError(f"configuration of format version {version}; this mla_pass reads {FORMAT_VERSION}")
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise MlaPassError(f"unknown configuration field(s): {', '.join(unknown)}")
        return cls(**values)
