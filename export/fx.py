"""Hugging Face causal LM -> torch.export.ExportedProgram with a flat cache that grows; no ONNX involved.

    inputs   input_ids [batch, sequence], attention_mask [batch, total], position_ids [batch, sequence]     int64
             past: a list of keys and values in turn, layer by layer    [batch, kv_heads, past, head_dim]
    outputs  logits [batch, sequence, vocab]
             keys and values in turn, with the new tokens'    [batch, kv_heads, past + sequence, head_dim]

total = past + sequence, 1 in attention_mask means attend, past may be 0. The graph is core ATen, but for what it is
worth reading whole: scaled_dot_product_attention, linear and matmul.

What a plain export gets wrong beside what `tracing` sees to, and what is done about it here:

    sizes       how a reshape of the trace laid out its numbers becomes a condition on every input, so that no single
                token passes: such assertions are deferred, then dropped, and the result is run at those sizes
    names       weights and modules are called as the model calls them, not as the wrapper around it does
    traces      stack traces are dropped: they name files of the machine that exported
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mla_pass.errors import MlaPassError
from mla_pass.export.layout import MAX_POSITION_KEY, quiet, require_libraries
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
    import torch
    from torch.export import ExportedProgram

WHOLE = ("scaled_dot_product_attention", "linear", "matmul")
"""ATen operators that are not decomposed."""
LOGGERS = ("torch.export", "torch.fx", "torch._dynamo")


def export_fx(source: "str | Path | torch.nn.Module", *, dtype: str = "float32") -> "ExportedProgram":
    """Export a Hugging Face causal LM, run the program against the model, and return it.

    Args:
        source: A model folder, a model id where a hub is reachable, or a model in memory (left as it is).
        dtype: "float32", "float16" or "bfloat16", of weights, cache and logits.

    Raises:
        MlaPassError: no such folder, not a causal LM, incomplete weights, a dtype that is not offered, a model torch
            cannot export, a result that differs from the model's, or torch or transformers is not installed.
    """
    if dtype not in DTYPES:
        raise MlaPassError(f"dtype {dtype!r} is not offered: choose one of {', '.join(DTYPES)}")
    require_libraries("torch", "transformers", purpose="exporting a Hugging Face model")
    import torch

    with quiet(*LOGGERS):
        folder = None if isinstance(source, torch.nn.Module) else locate(str(source))
        model = prepared(load(folder, dtype) if folder else source, dtype)
        program = traced(model)
        try:
            program = core_aten(program)
        except (RuntimeError, ValueError) as error:
            raise _failure(model, error) from error
        module = program.module()
        with torch.no_grad():
            verify(model, lambda x: [as_array(tensor) for tensor in module(*x[:3], x[3:])], dtype)
    return program


def traced(model: Any) -> "ExportedProgram":
    """What torch exports of a `tracing.prepared` model, not decomposed yet. Raises MlaPassError when it cannot."""
    import torch

    example = example_inputs(model, *TRACE_SHAPE)
    layers = len(example[-1]) // 2
    try:
        # Sizes of 0 and 1 are to be like any other.
        with torch.no_grad(), torch.fx.experimental._config.patch(backed_size_oblivious=True):
            program = torch.export.export(
                flat_cache_module(model), example, dynamic_shapes=input_shapes(layers), strict=False,
                prefer_deferred_runtime_asserts_over_guards=True,
            )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        raise _failure(model, error) from error
    _tidy(program)
    _name_as_the_model(program)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None:
        program.graph_module.meta[MAX_POSITION_KEY] = str(longest)
    return program


def core_aten(program: "ExportedProgram") -> "ExportedProgram":
    """A tidy program in core ATen, `WHOLE` operators left whole. Raises what torch raises when it cannot."""
    import torch

    table = torch.export.default_decompositions()
    for name in WHOLE:
        table.pop(getattr(torch.ops.aten, name).default, None)
    about = dict(program.graph_module.meta)
    values = [node.meta["val"] for node in program.graph.find_nodes(op="placeholder")]
    with any_size(next(value.fake_mode for value in values if isinstance(value, torch.Tensor))):
        program = program.run_decompositions(table)
    _tidy(program)
    program.graph_module.meta.update(about)
    return program


@contextmanager
def any_size(mode: Any) -> Iterator[None]:
    """For tracing with a program's values, which are of this fake mode: sizes of 0 and 1 are like any other, and how
    the trace happens to lay its numbers out is no condition on anybody's sizes."""
    import torch

    unheard = nullcontext() if mode.shape_env is None else mode.shape_env.suppress_guards()
    with torch.no_grad(), torch.fx.experimental._config.patch(backed_size_oblivious=True), unheard:
        yield


def _tidy(program: "ExportedProgram") -> None:
    """Remove assertions on sizes and types, what only they read, and traces."""
    graph = program.graph
    for node in reversed(graph.nodes):
        node.meta.pop("stack_trace", None)
        if node.op == "call_function" and "_assert" in getattr(node.target, "__name__", ""):
            graph.erase_node(node)
    graph.eliminate_dead_code()
    program.graph_module.recompile()


def _name_as_the_model(program: "ExportedProgram") -> None:
    """Names of weights and modules as the model has them, not as the wrapper does."""
    for spec in program.graph_signature.input_specs:
        if spec.target is not None:
            spec.target = spec.target.removeprefix(WRAPPER)
    for tensors in (program.state_dict, program.constants):
        for name in [name for name in tensors if name.startswith(WRAPPER)]:
            tensors[name.removeprefix(WRAPPER)] = tensors.pop(name)
    for node in program.graph.nodes:
        stack = node.meta.get("nn_module_stack", {})
        for key, (path, kind) in stack.items():
            stack[key] = (f"{path}.".removeprefix(WRAPPER).removesuffix("."), kind)
    program.validate()


def _failure(model: Any, error: Exception) -> MlaPassError:
    return MlaPassError(f"torch cannot export this {type(model).__name__}: {first_line(error)}")
