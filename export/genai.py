"""genai_config.json: what onnxruntime-genai has to be told of a model folder to run it as it is.

onnxruntime-genai keeps two cache tensors a layer, of one shape and type, and calls them key and value. It reads each
layer's width off the graph. Checked against onnxruntime-genai 0.18.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from mla_pass.errors import MlaPassError
from mla_pass.export.layout import MAX_POSITION_KEY, MODEL_FILE
from mla_pass.onnx.emit import HALVES
from mla_pass.onnx.ports import CacheSpec, CacheTensor, graph_ports

GENAI_CONFIG = "genai_config.json"
REPAIR = "put the checkpoint's own config.json beside the model, or choose layout='plain'"


@dataclass(frozen=True)
class Tokens:
    """Ids that have a meaning of their own. Where a model names no start or no padding, its end stands in."""

    bos_token_id: int
    eos_token_id: int | list[int]
    pad_token_id: int


@dataclass(frozen=True)
class About:
    """What the graph does not tell of a model and onnxruntime-genai asks for."""

    tokens: Tokens
    vocab_size: int
    hidden_size: int
    num_attention_heads: int
    max_position: int | None


def read_about(folder: Path) -> About:
    """The Hugging Face configuration in `folder`. Raises MlaPassError when it is missing or does not tell enough."""
    config = _read(folder / "config.json")
    generation = folder / "generation_config.json"
    if generation.is_file():
        config |= {name: value for name, value in _read(generation).items() if name.endswith("_token_id")}
    config |= config.get("text_config", {})
    missing = [name for name in (*_SIZES, "eos_token_id") if config.get(name) is None]
    if missing:
        raise MlaPassError(
            f"{folder / 'config.json'} names no {' and no '.join(missing)}, which layout='genai' needs: {REPAIR}"
        )
    end = config["eos_token_id"]
    first_end = end[0] if isinstance(end, list) else end
    start, padding = (config.get(name) for name in ("bos_token_id", "pad_token_id"))
    tokens = Tokens(first_end if start is None else start, end, first_end if padding is None else padding)
    sizes = {name: config[name] for name in _SIZES}
    return About(tokens=tokens, max_position=config.get("max_position_embeddings"), **sizes)


_SIZES = ("vocab_size", "hidden_size", "num_attention_heads")


def write_genai_config(folder: Path, model: ir.Model, library: str | None) -> Path:
    """Write genai_config.json for `model`, converted with ``layout="genai"``, into its `folder`.

    `library`: the op library's file name in that folder, or None for the function of stock operators.
    Raises MlaPassError as `read_about` does, and when the caches are not two equal halves a layer.
    """
    path = folder / GENAI_CONFIG
    path.write_text(json.dumps(genai_config(model, read_about(folder), library), indent=2) + "\n")
    return path


def genai_config(model: ir.Model, about: About, library: str | None) -> dict[str, Any]:
    """The content of genai_config.json; see `write_genai_config`."""
    cache, tokens, logits = graph_ports(model.graph)
    length = model.metadata_props.get(MAX_POSITION_KEY, about.max_position)
    if length is None:
        raise MlaPassError(f"neither the graph nor config.json tells how many positions the model has: {REPAIR}")
    session: dict[str, Any] = {"log_id": "onnxruntime-genai", "provider_options": []}
    if library is not None:
        session["custom_ops_library"] = library
    shared = cache.tensors[0].kind == "shared"
    return {
        "model": {
            **asdict(about.tokens),
            "context_length": int(length),
            "type": "decoder",
            "vocab_size": about.vocab_size,
            "decoder": {
                "session_options": session,
                "filename": MODEL_FILE,
                "hidden_size": about.hidden_size,
                "num_attention_heads": about.num_attention_heads,
                "num_key_value_heads": 1,
                "head_size": cache.tensors[0].width,
                "num_hidden_layers": _layers(cache),
                "inputs": {**{name: name for name in tokens}, **_names("past")},
                "outputs": {"logits": logits.name, **_names("present")},
            },
        },
        "search": {"do_sample": False, "max_length": int(length), "past_present_share_buffer": shared},
    }


def _layers(cache: CacheSpec) -> int:
    """How many layers keep a cache."""
    layers = [_layer(*cache.tensors[i : i + 2]) for i in range(0, len(cache.tensors), 2)]
    if layers != list(range(len(layers))):
        raise MlaPassError(
            f"the caches belong to the layers {layers}; onnxruntime-genai counts 0, 1, 2, ...: choose layout='plain'"
        )
    return len(layers)


def _layer(first: CacheTensor, second: CacheTensor | None = None) -> int:
    """The number of the layer that two cache tensors belong to."""
    names = [tensor.past.split(".") for tensor in (first, second) if tensor is not None]
    halves = second is not None and (first.heads, first.width, first.dtype) == (1, second.width, second.dtype)
    if not halves or [name[2:] for name in names] != [[part] for part in HALVES] or names[0][1] != names[1][1]:
        raise MlaPassError(
            f"the cache {first.past} is not half a row of a converted layer; convert every block with layout='genai'"
        )
    return int(names[0][1])


def _names(time: str) -> dict[str, str]:
    """Patterns of the cache's names in the graph."""
    return {f"{time}_{role}_names": f"{time}.%d.{part}" for role, part in zip(("key", "value"), HALVES, strict=True)}


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MlaPassError(f"{path} cannot be read ({error}); layout='genai' needs it: {REPAIR}") from error
    if not isinstance(found, dict):
        raise MlaPassError(f"{path} holds no JSON object; layout='genai' needs one: {REPAIR}")
    return found
