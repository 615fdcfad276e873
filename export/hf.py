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

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from mla_pass.export.tracing import (
    DTYPES,
    TRACE_SHAPE,
    WRAPPER,
    as_array,
    example_inputs,
    first_line,
    flat_cache_module,
    input_shapes,
    load,
    locate,
    prepared,
    verify,
)

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

OPSETS = (18, 23, 24)
LOGGERS = ("torch.onnx", "torch.export", "torch.fx", "torch._dynamo", "onnxscript", "onnx_ir")

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
        folder = None if isinstance(source, torch.nn.Module) else locate(str(source))
        model = prepared(load(folder, dtype) if folder else source, dtype)
        graph = _trace(model, opset)
        with new_folder(target) as partial:
            _save(graph, partial / MODEL_FILE)
            _copy_small_files(model, folder, partial, tokenizer)
            _verify(model, partial / MODEL_FILE, dtype)
    return target


# ---- tracing


def _trace(model: Any, opset: int) -> "ir.Model":
    import torch

    example = example_inputs(model, *TRACE_SHAPE)
    layers = len(example[-1]) // 2
    try:
        with torch.no_grad():
            program = torch.onnx.export(
                flat_cache_module(model),
                example,
                dynamo=True,
                dynamic_shapes=input_shapes(layers),
                opset_version=opset,
                input_names=["input_ids", "attention_mask", "position_ids", *_cache_names("past_key_values", layers)],
                output_names=["logits", *_cache_names("present", layers)],
                optimize=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        cause = error.__cause__ or error
        raise MlaPassError(f"torch cannot export this {type(model).__name__}: {first_line(cause)}") from error
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

    for name in [name for name in graph.graph.initializers if name.startswith(WRAPPER)]:
        value = graph.graph.initializers.pop(name)
        value.name = name.removeprefix(WRAPPER)
        graph.graph.initializers.add(value)
    for node in graph.graph.all_nodes():
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)  # paths of the machine that exported
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
        if scopes is not None:
            node.metadata_props["pkg.torch.onnx.name_scopes"] = scopes.replace(f"'{WRAPPER}", "'")
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
    """Run the written model in onnxruntime against torch."""
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
        verify(model, lambda inputs: session.run(None, dict(zip(names, map(as_array, inputs), strict=True))), dtype)
    except ort_errors.NotImplemented as error:
        if dtype == "float32":
            raise MlaPassError(f"onnxruntime {ort.__version__} cannot run the export: {first_line(error)}") from error
        log.warning("not compared with torch: onnxruntime on the CPU has no %s kernel for some node", dtype)
    except failures as error:
        raise MlaPassError(f"onnxruntime {ort.__version__} cannot run the export: {first_line(error)}") from error


