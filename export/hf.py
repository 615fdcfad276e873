"""Hugging Face causal LM -> ONNX with a flat cache; the caller names no shape.

    inputs   input_ids [batch, sequence], attention_mask [batch, total], position_ids [batch, sequence]     int64
             past_key_values.{i}.key, past_key_values.{i}.value   [batch, kv_heads, past, head_dim]
    outputs  logits [batch, sequence, vocab]
             present.{i}.key, present.{i}.value                   [batch, kv_heads, past + sequence, head_dim]

total = past + sequence, 1 in attention_mask means attend, past may be 0.

What a plain export gets wrong, and what is done about it here:

    cache       one made from the config windows itself and breaks once the past outgrows the window: it is made without
                a config, and the window stays where it belongs, in the mask
    positions   always an input, with a batch of its own: a row padded on the left counts from its own first token
    shapes      traced with batch, sequence and past larger than 1 and all different, so that none becomes a constant
    past        one symbol over all layers, not two a layer: less to reason about, in the trace as in the graph
    softcap     fused attention drops it: a config that caps its logits is traced with eager attention
    experts     grouped matrix products do not export: batched ones do
    weights     tied and equal ones are written once
"""

import copy
import json
import logging
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mla_pass.errors import MlaPassError
from mla_pass.export.layout import (
    DATA_FILE,
    MAX_POSITION_KEY,
    MODEL_FILE,
    copy_companions,
    has_tokenizer,
    new_folder,
    quiet,
    require_free,
    require_libraries,
)

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

OPSETS = (18, 23, 24)
DTYPES = ("float32", "float16", "bfloat16")
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1.6e-1}
"""Largest difference from torch, relative to the largest value, that the written model may show: room for rounding to
add up over some tens of layers."""

LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
LOGGERS = ("torch.onnx", "torch.export", "torch.fx", "torch._dynamo", "onnxscript", "onnx_ir")
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
TRACE_SHAPE = (2, 3, 5)
"""(batch, sequence, past) of the trace."""

log = logging.getLogger(__name__)


def export_hf(
    source: "str | Path | torch.nn.Module",
    out: str | Path,
    *,
    dtype: str = "float32",
    opset: int = 18,
    tokenizer: bool = True,
) -> Path:
    """Export a Hugging Face causal LM to the folder `out`, run it in onnxruntime against torch, and return the folder.

    Args:
        source: A model folder, a model id where a hub is reachable, or a model in memory (left as it is).
        out: The folder to make: model.onnx, model.onnx.data, config, generation config and tokenizer files.
        dtype: "float32", "float16" or "bfloat16", of weights, cache and logits.
        opset: 18, 23 or 24.
        tokenizer: Copy the tokenizer files too.

    Raises:
        MlaPassError: no such folder, not a causal LM, incomplete weights, an option that is not offered, a model torch
            cannot export, a result that differs from torch, a failed write, or torch, transformers or onnxscript is not
            installed. Nothing is left at `out`.
    """
    if dtype not in DTYPES:
        raise MlaPassError(f"dtype {dtype!r} is not offered: choose one of {', '.join(DTYPES)}")
    if opset not in OPSETS:
        raise MlaPassError(f"opset {opset} is not offered: choose one of {', '.join(map(str, OPSETS))}")
    target = require_free(out)
    require_libraries("torch", "transformers", "onnxscript", purpose="exporting a Hugging Face model")
    require_libraries("onnxruntime", purpose="checking the exported model", extra="cpu")
    import torch.onnx  # sets its loggers up when first imported: before they are muted

    with quiet(*LOGGERS):
        folder = None if isinstance(source, torch.nn.Module) else _locate(str(source))
        model = _prepare(_load(folder, dtype) if folder else source, dtype)
        graph = _trace(model, opset)
        with new_folder(target) as partial:
            _save(graph, partial / MODEL_FILE)
            _copy_small_files(model, folder, partial, tokenizer)
            _verify(model, partial / MODEL_FILE, dtype)
    return target


# ---- finding and loading


def _locate(source: str) -> Path:
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
                           f"({_first_line(error)}): name a local model folder") from error  # fmt: skip


def _load(folder: Path, dtype: str) -> Any:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise MlaPassError(f"{folder}/config.json cannot be read: {_first_line(error)}") from error
    _require_causal_lm(folder, config)
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=getattr(torch, dtype), output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise MlaPassError(f"the weights in {folder} cannot be loaded: {_first_line(error)}") from error
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


def _prepare(model: Any, dtype: str) -> Any:
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
    if getattr(config, "attn_logit_softcapping", None) is not None:
        model.set_attn_implementation("eager")
    if hasattr(model, "set_experts_implementation") and model.get_experts_implementation() is not None:
        model.set_experts_implementation("batched_mm")
    return model


def _rope_types(config: Any) -> set[str]:
    """The kinds of rotary scaling a config names, one for all layers or one a layer type."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    groups = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return {str(group["rope_type"]) for group in groups if "rope_type" in group}


# ---- tracing


def _flat_cache_module(model: Any) -> "torch.nn.Module":
    import torch
    from transformers import DynamicCache

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
                past_key_values=DynamicCache(list(zip(past[::2], past[1::2], strict=True))),
                use_cache=True,
            )
            return result.logits, *cache_tensors(result.past_key_values)

    return FlatCache().eval()


def cache_tensors(cache: Any) -> list[Any]:
    """Keys and values of every layer of a transformers cache, in turn."""
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def _example(model: Any, batch: int, sequence: int, past: int) -> "tuple[Any, Any, Any, list[torch.Tensor]]":
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
    return ids[:, past:], torch.ones_like(ids), positions, cache_tensors(cache)


def _trace(model: Any, opset: int) -> "ir.Model":
    import torch

    example = _example(model, *TRACE_SHAPE)
    layers = len(example[-1]) // 2
    batch, sequence, past = (torch.export.Dim(name) for name in ("batch", "sequence", "past"))
    tokens = {0: batch, 1: sequence}
    shapes = (tokens, {0: batch, 1: torch.export.Dim.DYNAMIC}, tokens, [{0: batch, 2: past}] * (2 * layers))
    try:
        with torch.no_grad():
            program = torch.onnx.export(
                _flat_cache_module(model),
                example,
                dynamo=True,
                dynamic_shapes=shapes,
                opset_version=opset,
                input_names=["input_ids", "attention_mask", "position_ids", *_cache_names("past_key_values", layers)],
                output_names=["logits", *_cache_names("present", layers)],
                optimize=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        cause = error.__cause__ or error
        raise MlaPassError(f"torch cannot export this {type(model).__name__}: {_first_line(cause)}") from error
    if program is None:
        raise MlaPassError("torch gave no program for this model: use torch 2.9 or newer")
    _simplify(program.model)
    _label(program.model, model, layers)
    return program.model


def _cache_names(prefix: str, layers: int) -> list[str]:
    return [f"{prefix}.{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]


def _simplify(graph: "ir.Model") -> None:
    """What torch's `optimize=True` does, without the one rule (Slice to Split) that takes quadratic time."""
    import onnx_ir.passes.common as passes
    import onnxscript.optimizer
    import onnxscript.rewriter.onnx_fusions
    from onnxscript.rewriter import RewritePass
    from onnxscript.rewriter.rules import common as rules

    passes.InlinePass()(graph)
    onnxscript.optimizer.fold_constants(graph)
    RewritePass(
        [
            rules.add_0_rule,
            rules.mul_by_1_rule,
            rules.collapse_slice_rule,
            rules.collapse_slice2_rule,
            rules.cast_cast_rule,
            rules.no_op_cast_rule,
            rules.no_op_expand_rule,
            rules.no_op_transpose_rule,
            rules.transpose_transpose_rule,
            rules.unsqueeze_unsqueeze_rule,
            rules.reshape_reshape_rule,
            rules.squeeze_reshape_1d_rule,
        ]
    )(graph)
    onnxscript.optimizer.fold_constants(graph)
    for clean in (
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedFunctionsPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    ):
        clean(graph)
    onnxscript.rewriter.onnx_fusions.fuse(graph)
    _widen_norms(graph)


def _widen_norms(graph: "ir.Model") -> None:
    """Give an RMS norm whose weight is wider than its input the input in the weight's type.

    The operator allows two types, and half-precision models whose weights are 1 + w need them, but ONNX Runtime's CPU
    runs such a norm by the operator's function, which multiplies the one type by the other.
    """
    import onnx_ir as ir

    for node in list(graph.graph):
        if node.op_type != "RMSNormalization":
            continue
        x, weight = node.inputs[:2]
        wide = None if weight is None else weight.dtype
        if x is None or x.dtype is None or wide is None or x.dtype.itemsize >= wide.itemsize:
            continue
        cast = ir.node("Cast", [x], attributes={"to": wide})
        cast.outputs[0].dtype, cast.outputs[0].shape = wide, x.shape
        graph.graph.insert_before(node, cast)
        node.replace_input_with(0, cast.outputs[0])


def _label(graph: "ir.Model", model: Any, layers: int) -> None:
    """Names of dimensions, parameters and modules as a reader expects them; the longest position as metadata."""
    import onnx_ir as ir

    mask = graph.graph.inputs[1]
    assert mask.shape is not None
    symbol = str(mask.shape[1])
    if re.fullmatch(r"\w+", symbol) is None:  # the trace found total = past + sequence by itself
        symbol = "total"
    for value in [*graph.graph.inputs, *graph.graph.outputs, *(v for n in graph.graph.all_nodes() for v in n.outputs)]:
        if value.shape is not None:
            value.shape = ir.Shape([_rename(dim, symbol) for dim in value.shape])
    mask.shape = ir.Shape(["batch", "total"])
    for present in graph.graph.outputs[1:]:
        assert present.shape is not None
        present.shape = ir.Shape([*present.shape[:2], "past + sequence", present.shape[3]])

    wrapper = "causal_lm."
    for name in [name for name in graph.graph.initializers if name.startswith(wrapper)]:
        value = graph.graph.initializers.pop(name)
        value.name = name.removeprefix(wrapper)
        graph.graph.initializers.add(value)
    for node in graph.graph.all_nodes():
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)  # paths of the machine that exported
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
        if scopes is not None:
            node.metadata_props["pkg.torch.onnx.name_scopes"] = scopes.replace(f"'{wrapper}", "'")
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None:
        graph.metadata_props[MAX_POSITION_KEY] = str(longest)


def _rename(dim: Any, symbol: str) -> Any:
    return dim if isinstance(dim, int) else re.sub(rf"\b{symbol}\b", "total", str(dim))


# ---- writing and checking


def _save(graph: "ir.Model", path: Path) -> None:
    import onnx_ir as ir

    ir.save(graph, path, external_data=DATA_FILE)


def _copy_small_files(model: Any, folder: Path | None, target: Path, tokenizer: bool) -> None:
    """Config, generation config and tokenizer, copied where there is a folder to copy from."""
    if folder is not None:
        names = copy_companions(folder, target, tokenizer=tokenizer)
        if tokenizer and not has_tokenizer(target):
            log.warning("%s holds no tokenizer: the exported folder will have none", folder)
    else:
        names = []
    if "config.json" not in names:
        model.config.save_pretrained(target)
    if "generation_config.json" not in names and model.generation_config is not None:
        model.generation_config.save_pretrained(target)


def _verify(model: Any, path: Path, dtype: str) -> None:
    """Run the written model and torch on the same text, with a past and without, rows padded on the left.

    torch sees the whole text at once and has no past to get wrong.
    """
    import onnxruntime as ort
    from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

    failures = (
        ort_errors.Fail, ort_errors.InvalidGraph, ort_errors.InvalidArgument, ort_errors.RuntimeException,
    )  # fmt: skip
    options = ort.SessionOptions()
    options.log_severity_level = 3
    try:
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = [tensor.name for tensor in session.get_inputs()]
        for batch, sequence, past in ((2, 6, 0), (2, 3, 9)):
            ids, mask = _text(model, batch, past + sequence)
            expected, feeds = _reference(model, ids, mask, past)
            found = session.run(None, dict(zip(names, feeds, strict=True)))
            _compare(found, expected, mask[:, past:].bool().numpy(), mask.bool().numpy(), TOLERANCE[dtype])
    except ort_errors.NotImplemented as error:
        if dtype == "float32":
            raise MlaPassError(f"onnxruntime {ort.__version__} cannot run the export: {_first_line(error)}") from error
        log.warning("not compared with torch: onnxruntime on the CPU has no %s kernel for some node", dtype)
    except failures as error:
        raise MlaPassError(f"onnxruntime {ort.__version__} cannot run the export: {_first_line(error)}") from error


def _text(model: Any, batch: int, total: int) -> "tuple[torch.Tensor, torch.Tensor]":
    """Token ids and mask [batch, total], two tokens of padding on the left of the first row."""
    import torch

    ids = (torch.arange(batch * total).reshape(batch, total) * 7 + 3) % model.get_input_embeddings().weight.shape[0]
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return ids, mask


def _reference(model: Any, ids: Any, mask: Any, past: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """torch's outputs for the last tokens, and the feeds that ask the exported model for the same."""
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
    feeds = [ids[:, past:], mask, positions[:, past:], *before]
    return [_array(t) for t in (logits[:, past:], *present)], [_array(t) for t in feeds]


def _array(tensor: "torch.Tensor") -> np.ndarray:
    import ml_dtypes
    import torch

    if tensor.dtype == torch.bfloat16:  # numpy has none of its own
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _compare(
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


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return textwrap.shorten(lines[0], 300, placeholder=" ...") if lines else type(error).__name__
