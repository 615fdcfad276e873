"""A Hugging Face causal LM made ready for a trace, whatever the graph is written in: `hf` and `fx` start here.

It is found and loaded, or copied; wrapped so that its cache is plain tensors; and given inputs of sizes from which no
size becomes a constant. Afterwards the graph is run beside it, on texts that are padded and on a past.
"""

import copy
import json
import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mla_pass.errors import MlaPassError

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "float16", "bfloat16")
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1.6e-1}
"""Largest difference from torch, relative to the largest value, that the written model may show: room for rounding to
add up over some tens of layers."""

LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
TRACE_SHAPE = (2, 3, 5)
"""(batch, sequence, past) of the trace."""
WRAPPER = "causal_lm."
"""What the names of weights and modules begin with in a trace of `flat_cache_module`."""
CHECK_SHAPES = ((2, 6, 0), (2, 3, 9), (1, 1, 4))
"""The same of the runs that check the result."""


# ---- finding and loading


def locate(source: str) -> Path:
    """The local folder of a model named by path or by hub id."""
    path = Path(source)
    if path.is_file():
        raise MlaPassError(f"{source} is a file: name a Hugging Face model folder (a .gguf becomes one with "
                           "python -m mla_pass.export.gguf)")  # fmt: skip
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise MlaPassError(f"{source} holds no config.json: it is not a Hugging Face model folder")
        return path
    if re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source) is None:
        raise MlaPassError(f"there is no folder {source}")
    return _download(source)



def _download(model_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(model_id, allow_patterns=list(HUB_FILES)))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise MlaPassError(f"there is no folder {model_id}, and no hub gave a model of that id "
                           f"({first_line(error)}): name a local model folder") from error  # fmt: skip



def load(folder: Path, dtype: str) -> Any:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        if json.loads((folder / "config.json").read_text()).get("model_type") == "mla_pass":
            import mla_pass.pytorch.modeling  # noqa: F401  a converted checkpoint: registers its format
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise MlaPassError(f"{folder}/config.json cannot be read: {first_line(error)}") from error
    _require_causal_lm(folder, config)
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=getattr(torch, dtype), output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise MlaPassError(f"the weights in {folder} cannot be loaded: {first_line(error)}") from error
    absent = sorted(loading["missing_keys"])
    if absent:
        raise MlaPassError(f"the weights in {folder} lack {len(absent)} tensors of a {type(model).__name__} "
                           f"({', '.join(absent[:3])}): the checkpoint is not a causal LM or not complete")  # fmt: skip
    return model



def _require_causal_lm(folder: Path, config: Any) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    made_for = getattr(config, "architectures", None) or []
    causal = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if causal is None or (made_for and all("ForCausalLM" not in name and name != causal.__name__ for name in made_for)):
        raise MlaPassError(f"{folder} is not a causal language model: it is a "
                           f"{', '.join(made_for) or type(config).__name__}")  # fmt: skip



def prepared(model: Any, dtype: str) -> Any:
    """A copy of `model` (sharing nothing that changes) that can be traced."""
    import torch

    model = copy.deepcopy(model).eval().requires_grad_(False)
    if not (hasattr(model, "config") and hasattr(model, "lm_head") and getattr(model, "can_generate", bool)()):
        raise MlaPassError(f"{type(model).__name__} is not a causal language model of transformers")
    for parameter in model.parameters():  # tables such as the rotary frequencies keep their own dtype
        parameter.data = parameter.data.to(getattr(torch, dtype))
    model.config.dtype = dtype
    config = model.config.get_text_config()
    rope = _rope_types(config) & set(LENGTH_DEPENDENT_ROPE)
    if rope:
        raise MlaPassError(f"rotary positions of the type {rope.pop()!r} change with the length of the text, which no "
                           "fixed graph can follow: set another rope_type in config.json")  # fmt: skip
    settle_attention(model)
    if hasattr(model, "set_experts_implementation") and model.get_experts_implementation() is not None:
        model.set_experts_implementation("batched_mm")
    return model



def settle_attention(model: Any) -> None:
    """Choose an implementation of attention that caps scores where the model does."""
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None:
        model.set_attn_implementation("eager")



def _rope_types(config: Any) -> set[str]:
    """The kinds of rotary scaling a config names, one for all layers or one a layer type."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    groups = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return {str(group["rope_type"]) for group in groups if "rope_type" in group}


# ---- what is traced


def flat_cache_module(model: Any) -> "torch.nn.Module":
    import torch
    from transformers import DynamicCache

    def pairs(past: list[torch.Tensor]) -> Any:
        return DynamicCache(list(zip(past[::2], past[1::2], strict=True)))

    cache_of = getattr(model, "flat_cache", pairs)  # a converted model keeps rows of its own kind

    class FlatCache(torch.nn.Module):
        """The model with its cache as plain tensors, keys and values in turn."""

        def __init__(self) -> None:
            super().__init__()
            self.causal_lm = model

        def forward(
            self,
            input_ids: torch.Tensor,
            attention_mask: torch.Tensor,
            position_ids: torch.Tensor,
            past: list[torch.Tensor],
        ) -> tuple[torch.Tensor, ...]:
            result = self.causal_lm(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache_of(past),
                use_cache=True,
            )
            return result.logits, *cache_tensors(result.past_key_values)

    return FlatCache().eval()


def cache_tensors(cache: Any) -> list[Any]:
    """Keys and values of every layer of a transformers cache, in turn."""
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def example_inputs(model: Any, batch: int, sequence: int, past: int) -> "tuple[Any, Any, Any, list[torch.Tensor]]":
    """Inputs of the given shape; the width of the cache is read off a run of the model itself."""
    import torch
    from transformers import DynamicCache

    ids = torch.arange(batch * (past + sequence)).reshape(batch, -1) % model.get_input_embeddings().weight.shape[0]
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=ids[:, :past], past_key_values=cache, use_cache=True)
    if not all(getattr(layer, "keys", None) is not None for layer in cache.layers) or not cache.layers:
        raise MlaPassError(f"{type(model).__name__} keeps something other than keys and values in its cache: only "
                           "attention with a key-value cache is supported")  # fmt: skip
    positions = torch.arange(past, past + sequence)[None].repeat(batch, 1)
    # A trace keeps how its inputs lie in memory, and compilers rely on it.
    tokens, rows = ids[:, past:].contiguous(), [tensor.contiguous() for tensor in cache_tensors(cache)]
    return tokens, torch.ones_like(ids), positions, rows


def input_shapes(layers: int) -> tuple[Any, ...]:
    """What may vary in `example_inputs`: one symbol for the past of all layers."""
    import torch

    batch, sequence, past = (torch.export.Dim(name) for name in ("batch", "sequence", "past"))
    tokens = {0: batch, 1: sequence}
    return tokens, {0: batch, 1: torch.export.Dim.DYNAMIC}, tokens, [{0: batch, 2: past}] * (2 * layers)


# ---- checking


def padded_text(model: Any, batch: int, total: int) -> "tuple[torch.Tensor, torch.Tensor]":
    """Token ids and mask [batch, total], two tokens of padding on the left of the first row."""
    import torch

    ids = (torch.arange(batch * total).reshape(batch, total) * 7 + 3) % model.get_input_embeddings().weight.shape[0]
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return ids, mask


def reference(model: Any, ids: Any, mask: Any, past: int) -> "tuple[list[torch.Tensor], list[torch.Tensor]]":
    """torch's outputs for the last tokens, and the inputs that ask the exported model for the same.

    torch sees the whole text at once and has no past to get wrong.
    """
    import torch
    from transformers import DynamicCache

    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    def run(tokens: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        cache = DynamicCache()
        shown = slice(0, tokens)
        result = model(
            input_ids=ids[:, shown], attention_mask=mask[:, shown], position_ids=positions[:, shown],
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        return result.logits, cache_tensors(cache)

    with torch.no_grad():
        logits, present = run(ids.shape[1])
        before = run(past)[1] if past else [tensor[:, :, :0] for tensor in present]
    return [logits[:, past:], *present], [ids[:, past:], mask, positions[:, past:], *before]


def as_array(tensor: "torch.Tensor") -> np.ndarray:
    import ml_dtypes
    import torch

    if tensor.dtype == torch.bfloat16:  # numpy has none of its own
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def verify(model: Any, run: "Callable[[list[torch.Tensor]], list[np.ndarray]]", dtype: str) -> None:
    """Run a graph and torch on the same text, with a past and without, rows padded on the left.

    `run` takes the graph's inputs in order and returns its outputs. Raises MlaPassError where they differ.
    """
    for batch, sequence, past in CHECK_SHAPES:
        ids, mask = padded_text(model, batch, past + sequence)
        expected, inputs = reference(model, ids, mask, past)
        new, seen = mask[:, past:].bool().numpy(), mask.bool().numpy()
        compare(run(inputs), [as_array(tensor) for tensor in expected], new, seen, TOLERANCE[dtype])


def compare(
    found: Sequence[np.ndarray], expected: Sequence[np.ndarray], new: np.ndarray, seen: np.ndarray, tolerance: float
) -> None:
    """Raise unless logits and caches agree wherever there is no padding.

    Args:
        found, expected: logits [batch, sequence, vocab], then keys and values [batch, kv_heads, total, head_dim].
        new, seen: [batch, sequence] and [batch, total], true where there is a token.
    """
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if i:
            ours, theirs, rows = ours.swapaxes(1, 2)[seen], theirs.swapaxes(1, 2)[seen], "present"
        else:
            ours, theirs, rows = ours[new], theirs[new], "logits"
        scale = float(np.abs(theirs.astype(np.float64)).max())
        error = float(np.abs(ours.astype(np.float64) - theirs.astype(np.float64)).max()) / scale
        if not error <= tolerance:  # a NaN is a difference
            raise MlaPassError(f"the exported model differs from torch: {rows} by {error:.2g} of their largest value, "
                               f"where rounding explains {tolerance:.2g}; this model cannot be exported")  # fmt: skip


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return textwrap.shorten(lines[0], 300, placeholder=" ...") if lines else type(error).__name__
