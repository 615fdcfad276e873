"""A converted checkpoint on disk.

    config.json            the original's, with "model_type": "mla_pass" and what the conversion made under "mla"
    model-*.safetensors    the original's weights but for those of attention
    latent-*.safetensors   those of latent attention
    latent_cache.safetensors   what a `LatentCache` needs beside the unmodified original
    modeling_mla_pass.py   lets trust_remote_code find mla_pass
    mla_pass.json          configuration and report; tokenizer and generation settings go along
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mla_pass.errors import MlaPassError
from mla_pass.export.layout import quiet
from mla_pass.onnx.emit import Conversion
from mla_pass.pytorch.modeling import KEY, MODEL_TYPE, BlockSpec
from mla_pass.pytorch.spec import FORMAT_VERSION, LatentLayer, LayerSpec, as_torch, latent_layer, layer_spec, maps_of
from mla_pass.site import Branch, Norm

CACHE_FILE = "latent_cache.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHIM_FILE = "modeling_mla_pass.py"
SHIM = '"""Loads this folder through mla_pass: pip install "mla-pass[torch]"."""\n' + (
    "from mla_pass.pytorch.modeling import LatentConfig, LatentModel  # noqa: F401\n"
)
SHARD_BYTES = 1 << 30
"""Latent weights that are in memory at a time, and so in one file."""


def write_model(source: Path, conversions: Sequence[Conversion], dtype: torch.dtype, max_positions: int,
                folder: Path) -> None:  # fmt: skip
    """Weights and config.json of the converted model. Raises MlaPassError when `source` cannot be read."""
    config = read_config(source)
    prefixes = tuple(f"{conversion.site.name}." for conversion in conversions)
    placed = copy_weights(source, prefixes, folder)
    blocks: list[BlockSpec] = []

    def latent() -> Iterator[tuple[str, Tensor]]:
        for conversion in conversions:
            block, tensors = block_of(conversion)
            blocks.append(block)
            for name, array in tensors.items():
                yield f"{conversion.site.name}.{name}", as_torch(array, dtype)

    placed |= write_shards(latent(), folder)
    size = sum((folder / file).stat().st_size for file in set(placed.values()))
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(placed.items()))}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    told = {
        "format_version": FORMAT_VERSION, "family": config["model_type"], "max_positions": max_positions,
        "blocks": [block.to_json() for block in blocks],
    }  # fmt: skip
    module = SHIM_FILE.removesuffix(".py")
    auto = {"AutoConfig": f"{module}.LatentConfig", "AutoModelForCausalLM": f"{module}.LatentModel"}
    config |= {"model_type": MODEL_TYPE, KEY: told, "auto_map": auto, "dtype": str(dtype).removeprefix("torch.")}
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / SHIM_FILE).write_text(SHIM)


def write_cache(conversions: Iterable[Conversion], dtype: torch.dtype, folder: Path) -> None:
    """What `load_layers` reads."""
    tensors: dict[str, Tensor] = {}
    for conversion in conversions:
        layer = latent_layer(conversion, dtype)
        tensors |= {f"{layer.spec.layer}.{name}": x for name, x in layer.maps.items()}
    save_file(tensors, folder / CACHE_FILE)


def load_layers(folder: Path) -> tuple[list[LatentLayer], int]:
    """The blocks of a converted checkpoint with the maps that a cache needs, and its most positions.

    Raises MlaPassError when the folder holds no such thing, or cannot be read.
    """
    told = read_config(folder).get(KEY)
    if not isinstance(told, dict):
        raise MlaPassError(
            f"{folder} holds no converted checkpoint ({KEY!r} in config.json); make one with mla-pass convert --format "
            "hf"
        )
    if not (folder / CACHE_FILE).is_file():
        raise MlaPassError(
            f"{folder} has no {CACHE_FILE}: it was healed, or its conversion leaves numbers of a key un-rotated, so "
            "that only an attention of our own can serve it; load the folder as a model, or convert without rope_mode"
        )
    if told.get("format_version") != FORMAT_VERSION:
        raise MlaPassError(
            f"{folder} is of format version {told.get('format_version')}; this mla_pass reads {FORMAT_VERSION}: "
            "convert the model again"
        )
    specs = [LayerSpec.from_json(block["spec"]) for block in told["blocks"]]
    maps: dict[int, dict[str, Tensor]] = {spec.layer: {} for spec in specs}
    try:
        with safe_open(folder / CACHE_FILE, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  not a dict
                layer, _, name = key.partition(".")
                maps[int(layer)][name] = file.get_tensor(key)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise MlaPassError(f"{folder / CACHE_FILE} cannot be read ({error}); convert the model again") from error
    for spec in specs:
        missing = [name for name in maps_of(spec.nope_dim) if name not in maps[spec.layer]]
        if missing:
            raise MlaPassError(f"{folder / CACHE_FILE} lacks {missing[0]} of {spec.name}; convert the model again")
    return [LatentLayer(spec, maps[spec.layer]) for spec in specs], int(told["max_positions"])


# ---- one block


def block_of(conversion: Conversion) -> tuple[BlockSpec, dict[str, np.ndarray]]:
    """A converted site as a module's description and its weights, float64, by the names of `LatentAttention`."""
    site, w, plan = conversion.site, conversion.weights, conversion.absorption
    norms = {"query": site.query.norm, "key": site.key.norm, "value": site.value.norm}
    tensors: dict[str, np.ndarray] = {}
    if plan.query_map:
        query, query_bias = plan.fold_query(site, w)
    else:
        query, query_bias = site.query.projection.weight.read(), _bias(site.query)
    _linear(tensors, "query", query, query_bias)
    encoded = conversion.behind_norm
    if encoded:
        for name, branch in (("key", site.key), ("value", site.value)):
            _linear(tensors, name, branch.projection.weight.read(), _bias(branch))
        _linear(tensors, "row", w.encode.T, w.encode_bias)
    else:
        _linear(tensors, "row", *conversion.row_projection())
    for name, norm in norms.items():
        if isinstance(norm, Norm) and (name == "query" or encoded):
            tensors[f"{name}_norm.weight"] = norm.weight.read()
    output, output_bias = conversion.output_projection()
    _linear(tensors, "output", output, output_bias)
    keys = not plan.key_up and w.nope_dim > 0
    given = {"query_map": not plan.query_map, "key_up": keys, "key_mean": keys, "value_up": not plan.value_up}
    tensors |= {name: getattr(w, name) for name, there in given.items() if there}
    block = BlockSpec(
        layer_spec(conversion), hidden=query.shape[0], output=output.shape[1], query_width=query.shape[1],
        query_map=given["query_map"], key_up=keys, value_up=given["value_up"], query_bias=query_bias is not None,
        output_bias=output_bias is not None, query_norm=_epsilon(norms["query"]), key_norm=_epsilon(norms["key"]),
        value_norm=_epsilon(norms["value"]), encoded=encoded,
        key_bias=encoded and _bias(site.key) is not None, value_bias=encoded and _bias(site.value) is not None,
    )  # fmt: skip
    return block, tensors


def _linear(tensors: dict[str, np.ndarray], name: str, weight: np.ndarray, bias: np.ndarray | None) -> None:
    """y = x @ weight + bias as torch's Linear keeps it."""
    tensors[f"{name}.weight"] = weight.T
    if bias is not None:
        tensors[f"{name}.bias"] = bias


def _bias(branch: Branch) -> np.ndarray | None:
    return None if branch.projection.bias is None else branch.projection.bias.read()


def _epsilon(norm: Norm | None) -> float | None:
    return None if norm is None else norm.epsilon


# ---- files


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder. Raises MlaPassError when there is none that can be read."""
    try:
        return json.loads((folder / "config.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise MlaPassError(
            f"{folder}/config.json cannot be read ({error}); expected a Hugging Face model folder"
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder. Raises MlaPassError when there are none."""
    index = folder / INDEX_FILE
    if index.is_file():
        return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    raise MlaPassError(
        f"{folder} holds no model.safetensors; save the model with save_pretrained, which writes safetensors"
    )


def open_weights(path: Path) -> Any:
    """A file of weights. Raises MlaPassError when it cannot be read; safetensors looks at all of its header here."""
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise MlaPassError(f"{path} cannot be read ({error}); the checkpoint is not complete") from error


def copy_weights(source: Path, dropped: tuple[str, ...], target: Path) -> dict[str, str]:
    """Copy weights file by file but those whose names begin with one of `dropped`; returns the file of each name."""
    placed: dict[str, str] = {}
    files = weight_files(source)
    for number, path in enumerate(files, 1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        with open_weights(path) as file:
            kept = {key: file.get_tensor(key) for key in file.keys() if not key.startswith(dropped)}  # noqa: SIM118
        if kept:
            save_file(kept, target / name, metadata={"format": "pt"})
            placed |= dict.fromkeys(kept, name)
    return placed


def write_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path) -> dict[str, str]:
    """Write tensors as they come, a file for every `SHARD_BYTES`; returns the file of each name."""
    placed: dict[str, str] = {}
    held: dict[str, Tensor] = {}

    def flush() -> None:
        name = f"latent-{len(set(placed.values())) + 1:05}.safetensors"
        save_file(held, folder / name, metadata={"format": "pt"})
        placed.update(dict.fromkeys(held, name))
        held.clear()

    for name, tensor in tensors:
        held[name] = tensor
        if sum(x.nbytes for x in held.values()) >= SHARD_BYTES:
            flush()
    if held:
        flush()
    return placed


def check(folder: Path) -> None:
    """Load a folder and run a token. Raises MlaPassError when weights are missing or logits are not finite."""
    from transformers import AutoModelForCausalLM

    with quiet():
        model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    wrong = [*loading["missing_keys"], *loading["unexpected_keys"]]
    if wrong:
        raise MlaPassError(
            f"the converted checkpoint does not fit its model: {len(wrong)} weights, {sorted(wrong)[0]} among them, "
            "are missing or not expected; nothing was written"
        )
    with torch.no_grad():
        logits = model.eval()(torch.zeros(1, 3, dtype=torch.int64)).logits
    if not torch.isfinite(logits).all():
        raise MlaPassError("the converted model's logits are not finite; nothing was written")
