"""The guide's Python function."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mla_pass.export.layout import quiet
from mla_retrofit.request import FLASH, Request, plan

if TYPE_CHECKING:
    from mla_pass.pytorch.convert import TorchResult


def convert_to_mla(
    model_name_or_path: str | Path, *, num_kv_heads: int | None = None, head_dim: int | None = None,
    rope_mode: str | None = None, absorb: bool = False, flash_attn: bool = False, return_model: bool = True,
    output_dir: str | Path | None = None, dtype: str | None = None, calibrate: str | Path | np.ndarray = "self",
    budget: float | None = None, format: str = "hf", progress: Callable[[str, int, int], None] | None = None,
    **options: Any,
) -> tuple[Any, Any] | None:  # fmt: skip
    """Convert a Hugging Face model to latent attention; returns (model, tokenizer), or None without `return_model`.

    Args:
        model_name_or_path: A model folder, or a model id where a hub is reachable.
        num_kv_heads, head_dim: Their product is the width of the latent that keys and values of a token share.
        rope_mode: "extend" takes the rotation off what is not kept rotated, "repeat" keeps every key rotated; None,
            better than both, turns keys block by block.
        absorb: Fold the up-projections into the query and output projections wherever that is possible, not only where
            it pays.
        flash_attn: Load the result with transformers' flash attention 2.
        output_dir: Folder to write, new or empty; None writes nothing.
        dtype: Of the checkpoint's weights: "float32", "float16" or "bfloat16"; None takes the original's.
        calibrate: Text to fit the latents to: a file, token ids, or "self", text that the model writes.
        budget: Instead of num_kv_heads and head_dim: the new cache as a share of the old.
        format: What is written: "hf", "onnx", or "both", the ONNX folder (float32) then inside the other.
        progress: Hears (stage, done, total).
        options: Further fields of `mla_pass.MlaConfig`.

    Raises:
        mla_pass.MlaPassError: a request that cannot be served, told before any work where one can tell.
    """
    request = Request(
        str(model_name_or_path), None if output_dir is None else Path(output_dir), num_kv_heads, head_dim, rope_mode,
        absorb, flash_attn, return_model, dtype, calibrate, budget, format, options,
    )  # fmt: skip
    done = retrofit(request, progress)
    return done.load() if return_model else None


@dataclass(frozen=True)
class Retrofitted:
    """A conversion that is done, and saved where that was asked for."""

    request: Request
    folder: Path
    """Of the original."""
    result: TorchResult

    def load(self) -> tuple[Any, Any]:
        """The converted model and its tokenizer."""
        saved = self.request.output_dir
        if saved is not None and self.request.format != "onnx":
            return self.model(saved), self.tokenizer()
        with tempfile.TemporaryDirectory(prefix="mla_retrofit_") as place:
            return self.model(self.result.save(Path(place) / "model")), self.tokenizer()

    def model(self, folder: Path) -> Any:
        """The model of a folder, converted or not, of the type the converted one has."""
        from transformers import AutoModelForCausalLM

        import mla_pass.pytorch.modeling  # noqa: F401  registers the format

        implementation = {"attn_implementation": FLASH} if self.request.flash_attn else {}
        with quiet():
            return AutoModelForCausalLM.from_pretrained(folder, dtype=self.result.dtype, **implementation).eval()

    def tokenizer(self) -> Any:
        """The original's tokenizer."""
        from transformers import AutoTokenizer

        with quiet():
            return AutoTokenizer.from_pretrained(self.folder)


def retrofit(request: Request, progress: Callable[[str, int, int], None] | None = None) -> Retrofitted:
    """Convert, and save to the request's folder. Raises MlaPassError; nothing is left behind then."""
    planned = plan(request)
    from mla_pass.pytorch.convert import convert_checkpoint

    result = convert_checkpoint(
        planned.folder, planned.config, dtype=request.dtype, calibrate=request.calibrate, progress=progress
    )
    if request.output_dir is not None:
        result.save(request.output_dir, format=request.format)
    return Retrofitted(request, planned.folder, result)
