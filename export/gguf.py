"""GGUF checkpoint -> Hugging Face folder (float32 safetensors, config, tokenizer).

    python -m mla_pass.export.gguf MODEL.gguf OUT

GGUF keeps a model's shape in its metadata and its weights, often quantised, under llama.cpp's names. Three things turn
it into a checkpoint that `mla_pass.export.hf` reads:

    metadata   one table from GGUF keys to transformers' config fields
    names      the `gguf` package's own table, held against what transformers expects: none missing, none left over
    rotary     llama.cpp's llama layout pairs neighbouring rows of q and k; transformers pairs row i with row i + d/2

Weights are dequantised, not restored: what quantisation lost stays lost.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mla_pass.errors import MlaPassError
from mla_pass.export.layout import new_folder, quiet, require_free, require_libraries, umask


@dataclass(frozen=True)
class Architecture:
    """How one GGUF architecture is written in transformers.

    Attributes:
        model_type: transformers' name for its config.
        interleaved: rows of q and k per head come as (0, d/2, 1, d/2 + 1, ...) and have to be put back in order.
    """

    model_type: str
    interleaved: bool


ARCHITECTURES = {
    "llama": Architecture("llama", interleaved=True),
    "qwen2": Architecture("qwen2", interleaved=False),
    "qwen3": Architecture("qwen3", interleaved=False),
}

# config field -> GGUF key, without the architecture's prefix
CONFIG_KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
TOKEN_IDS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
# rope.scaling.type -> the fields of the scaling
ROPE_SCALINGS = {
    "linear": {"factor": "rope.scaling.factor"},
    "yarn": {
        "factor": "rope.scaling.factor",
        "original_max_position_embeddings": "rope.scaling.original_context_length",
    },
}


def gguf_to_hf(path: str | Path, out: str | Path) -> Path:
    """Write the GGUF checkpoint at `path` as a Hugging Face folder at `out`, weights in float32; returns the folder.

    Raises:
        MlaPassError: not a GGUF, a truncated or a split one; an architecture, rope scaling or quantisation that is not
            supported; tensors missing or left over; no usable tokenizer; `out` is taken or cannot be written; torch,
            transformers or gguf is not installed.
    """
    target = require_free(out)
    require_libraries("gguf", "safetensors", "torch", "transformers", purpose="reading a GGUF")
    source = Path(path)
    with quiet():
        reader = _open(source)
        architecture = _architecture(source, reader)
        config = _config(source, reader, architecture)
        names = _names(source, reader, config)
        tokenizer = _tokenizer(source)
        tensors = _tensors(source, reader, architecture, config, names)
        _write(target, config, tensors, tokenizer)
    return target


def _open(source: Path) -> Any:
    from gguf import GGUFReader

    if not source.is_file():
        raise MlaPassError(f"{source} is not a file: name a .gguf checkpoint")
    try:
        with source.open("rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise MlaPassError(f"{source} is not a GGUF: it begins with {magic!r} where b'GGUF' was expected")
        reader = GGUFReader(source)
    except OSError as error:
        raise MlaPassError(f"cannot read {source}: {error.strerror or error}") from error
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        # what the reader stumbles over when the file ends early or its sizes are nonsense
        raise MlaPassError(f"{source} is truncated or corrupt ({error}): fetch it again") from error
    if _field(reader, "split.count", 1) != 1:
        raise MlaPassError(f"{source} is one part of a split GGUF: merge the parts with gguf-split first")
    return reader


def _field(reader: Any, key: str, default: Any = None) -> Any:
    field = reader.fields.get(key)
    return default if field is None else field.contents()


def _architecture(source: Path, reader: Any) -> Architecture:
    name = _field(reader, "general.architecture")
    if name not in ARCHITECTURES:
        raise MlaPassError(
            f"{source} holds the architecture {name!r}; supported are {', '.join(ARCHITECTURES)}: "
            "start from the model's Hugging Face folder instead"
        )
    return ARCHITECTURES[name]


def _config(source: Path, reader: Any, architecture: Architecture) -> Any:
    """The transformers config that the metadata describes."""
    from transformers import AutoConfig

    prefix = _field(reader, "general.architecture")

    def get(key: str, default: Any = None) -> Any:
        return _field(reader, f"{prefix}.{key}", default)

    shapes = {tensor.name: tensor.shape for tensor in reader.tensors}
    missing = [key for key in CONFIG_KEYS.values() if get(key) is None]
    if missing or "token_embd.weight" not in shapes:
        raise MlaPassError(f"{source} lacks {', '.join(missing) or 'token_embd.weight'}: it is no complete model")
    values = {name: get(key) for name, key in CONFIG_KEYS.items()}
    values["num_key_value_heads"] = get("attention.head_count_kv", values["num_attention_heads"])
    values["head_dim"] = get("attention.key_length", values["hidden_size"] // values["num_attention_heads"])
    values["vocab_size"] = int(shapes["token_embd.weight"][1])
    values["tie_word_embeddings"] = "output.weight" not in shapes
    values |= {name: _field(reader, f"tokenizer.ggml.{key}_token_id") for name, key in TOKEN_IDS.items()}
    config = AutoConfig.for_model(
        architecture.model_type,
        **values,
        rope_theta=float(get("rope.freq_base", 10000.0)),
        rope_scaling=_rope_scaling(source, get),
    )
    config.dtype = "float32"
    return config


def _rope_scaling(source: Path, get: Any) -> dict[str, Any] | None:
    kind = get("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind not in ROPE_SCALINGS:
        raise MlaPassError(
            f"{source} scales its rotary positions by {kind!r}; supported are {', '.join(ROPE_SCALINGS)}: "
            "start from the model's Hugging Face folder instead"
        )
    return {"rope_type": kind, **{name: get(key) for name, key in ROPE_SCALINGS[kind].items()}}


def _names(source: Path, reader: Any, config: Any) -> dict[str, str]:
    """GGUF tensor name -> transformers parameter name; each tensor has to find a parameter, each parameter a tensor."""
    import torch
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):  # names and shapes, no memory
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    name = _field(reader, "general.architecture")
    table = get_tensor_name_map(next(k for k, v in MODEL_ARCH_NAMES.items() if v == name), config.num_hidden_layers)
    by_gguf_name = {table.get_name(key, try_suffixes=(".weight", ".bias")): key for key in expected}
    found = {tensor.name: tuple(int(n) for n in tensor.shape[::-1]) for tensor in reader.tensors}

    tied = {"output.weight"} if config.tie_word_embeddings else set()
    missing = by_gguf_name.keys() - found.keys() - tied
    left_over = found.keys() - by_gguf_name.keys()
    if missing or left_over:
        kind, which = ("lacks", missing) if missing else ("holds, beyond what its architecture has,", left_over)
        raise MlaPassError(f"{source} {kind} {len(which)} tensors ({', '.join(sorted(map(str, which))[:3])}): "
                           "start from the model's Hugging Face folder instead")  # fmt: skip
    for gguf_name, shape in found.items():
        if shape != expected[by_gguf_name[gguf_name]]:
            raise MlaPassError(f"{source}: {gguf_name} has the shape {shape}, its metadata asks for "
                               f"{expected[by_gguf_name[gguf_name]]}")  # fmt: skip
    return {gguf_name: by_gguf_name[gguf_name] for gguf_name in found}


def _tokenizer(source: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source.resolve().parent, gguf_file=source.name)
    except Exception as error:
        # a broken vocabulary comes out of the tokenizers library as a bare Exception; a subclass may be a bug of ours
        if type(error) not in (Exception, ValueError, KeyError, OSError, NotImplementedError, TypeError):
            raise
        raise MlaPassError(f"transformers cannot read the tokenizer in {source}: {error}") from error


def _tensors(
    source: Path, reader: Any, architecture: Architecture, config: Any, names: dict[str, str]
) -> dict[str, np.ndarray]:
    """Dequantised weights under transformers' names."""
    from gguf import dequantize

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    interleaved = heads if architecture.interleaved else {}
    tensors = {}
    for tensor in reader.tensors:
        try:
            values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        except (NotImplementedError, ValueError) as error:
            raise MlaPassError(f"{source}: {tensor.name} is stored as {tensor.tensor_type.name}, "
                               f"which cannot be read ({error})") from error  # fmt: skip
        values = values.reshape([int(n) for n in tensor.shape[::-1]])
        kind = tensor.name.split(".")[-2]
        tensors[names[tensor.name]] = deinterleave(values, interleaved[kind]) if kind in interleaved else values
    return tensors


def deinterleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from (0, d/2, 1, d/2 + 1, ...) back to (0, 1, ..., d - 1).

    Args:
        weight: [heads * d, ...], llama.cpp's order, in which a rotary pair is two neighbouring rows.

    Returns:
        The same shape; a rotary pair is now row i and row i + d/2.
    """
    half = weight.shape[0] // heads // 2
    pairs = weight.reshape(heads, half, 2, *weight.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)


def _write(target: Path, config: Any, tensors: dict[str, np.ndarray], tokenizer: Any) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file
    from transformers import GenerationConfig

    with new_folder(target) as folder:
        try:
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            (folder / "model.safetensors").chmod(0o666 & ~umask())  # safetensors makes it private
        except SafetensorError as error:  # its own class, also for a full disk
            raise OSError(str(error)) from error
        config.save_pretrained(folder)
        GenerationConfig.from_model_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mla_pass.export.gguf", description="GGUF -> Hugging Face folder")
    parser.add_argument("input", help="a .gguf checkpoint")
    parser.add_argument("output", help="the folder to make")
    args = parser.parse_args(arguments)
    try:
        print(gguf_to_hf(args.input, args.output))
    except MlaPassError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
