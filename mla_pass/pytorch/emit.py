"""Rewriting an exported program: every site's caches, rotation and attention give way to attention over latent rows.

What replaces a site is traced from `mla_pass.pytorch.latent`, in its expanded form, and stands in the graph as plain
ATen nodes: no operator of this project's is needed to run the program, to hand it on to ONNX or to compile it. The
program keeps its inputs and outputs in their places; where keys and values of a converted block were there are now

    latents [batch, 1, past, rank]  and  rotated parts [batch, 1, past, rope_dim]     (past + sequence in the outputs)

A cache grows: a program has no side effects, so that it cannot write into a buffer. What only the old attention needed
is then dead and removed, weights included; everything else stays as it was, and the tensors are shared.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.nn import Parameter
from torch.utils import _pytree as pytree

from mla_pass.errors import MlaPassError
from mla_pass.export.fx import core_aten
from mla_pass.export.layout import MAX_POSITION_KEY
from mla_pass.onnx.emit import Conversion
from mla_pass.pytorch import aten
from mla_pass.pytorch.block import Block
from mla_pass.pytorch.spec import as_torch
from mla_pass.pytorch.view import FxView
from mla_pass.site import AttentionSite, Rope
from mla_pass.storage import STORED, stored_width

TABLES = "mla_pass.rope_"
"""What the names of the tables of cos and sin begin with."""
LIFTED = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def copied(program: ExportedProgram) -> ExportedProgram:
    """A program with a graph of its own and the same tensors."""
    graph = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    returned = graph.graph_copy(program.graph, nodes)
    output = graph.output(returned)
    output.meta = dict(program.graph.output_node().meta)
    signature = copy.deepcopy(program.graph_signature)
    renamed = {old.name: new.name for old, new in nodes.items()}  # what is called like a keyword is not so again
    return _program(program, graph, signature, dict(program.state_dict), dict(program.constants), renamed)


def emit(view: FxView, conversions: Sequence[Conversion], max_positions: int) -> ExportedProgram:
    """The program that `view` reads, rewritten at every site; its graph is used up. `max_positions`: rows of the tables
    of cos and sin.

    Raises MlaPassError when the caches are used in a way that cannot be replaced.
    """
    emitter = Emitter(view, max_positions)
    for conversion in conversions:
        emitter.rewrite(conversion)
    program = core_aten(emitter.finished())
    program.graph_module.meta[MAX_POSITION_KEY] = str(max_positions)
    return program


class Emitter:
    """Rewrites one program."""

    def __init__(self, view: FxView, max_positions: int) -> None:
        """Nothing is changed before :meth:`rewrite`."""
        self.view, self.program, self.max_positions = view, view.program, max_positions
        self.graph, self.signature = self.program.graph, self.program.graph_signature
        self.state, self.constants = dict(self.program.state_dict), dict(self.program.constants)
        self.tables: list[tuple[Rope, dict[str, fx.Node]]] = []
        self.small: dict[Any, fx.Node] = {}
        self.renamed: dict[str, str] = {}
        self.made: set[fx.Node] = set()
        self.rows: dict[fx.Node, AttentionSite] = {}
        """Inputs that are rows by now."""
        names = set(self.signature.user_inputs)
        self.inputs = [node for node in self.graph.find_nodes(op="placeholder") if node.name in names]
        self.fake = self.inputs[0].meta["val"].fake_mode

    # ---- one site

    def rewrite(self, conversion: Conversion) -> None:
        """Put the traced nodes of a site into the graph and hand its context over."""
        site = conversion.site
        block = Block(conversion)
        replaced = output_product(self.view, site) if conversion.absorption.value_up else site.context
        self.narrow(conversion)
        operands = {
            **block.handles(),
            **{name: self.weight(f"{site.name}.{name}", tensor) for name, tensor in block.weights().items()},
            **self.rope_tables(site.rope),
        }
        result, *presents = self.inline(block.traced(operands), list(operands.values()), site.context)
        replaced.replace_all_uses_with(result)
        for old, new in zip((site.cache.present_key, site.cache.present_value), presents, strict=True):
            self.hand_out(old, new)

    def narrow(self, conversion: Conversion) -> None:
        """Give the inputs of keys and values the sizes and types of the rows that take their places."""
        site, w, row = conversion.site, conversion.weights, conversion.row
        sizes = ((site.cache.past_key, w.rank, row.latent), (site.cache.past_value, w.rope_dim, row.rope))
        for past, numbers, stored in sizes:
            old = past.meta["val"]
            dtype = getattr(torch, STORED[stored].name)
            with self.fake:
                past.meta["val"] = torch.empty(
                    old.shape[0], 1, old.shape[2], stored_width(numbers, stored), dtype=dtype, device=old.device
                )
            past.meta.pop("tensor_meta", None)
            self.rows[past] = site

    def hand_out(self, old: fx.Node, new: fx.Node) -> None:
        """Return `new` in place of the output that `old` is."""
        output = self.graph.output_node()
        returned = list(output.args[0])  # type: ignore[arg-type]
        for place, each in enumerate(returned):
            if isinstance(each, fx.Node) and self.view.resolved(each) is old:
                self.renamed[each.name] = new.name
                returned[place] = new
        output.args = (tuple(returned),)

    def inline(self, traced: fx.GraphModule, operands: Sequence[fx.Node], before: fx.Node) -> list[fx.Node]:
        """Copy a traced graph to where `before` stands; returns its results."""
        found: dict[fx.Node, Any] = dict(zip(traced.graph.find_nodes(op="placeholder"), operands, strict=True))
        stack = before.meta.get("nn_module_stack")
        for node in traced.graph.nodes:
            if node.op == "get_attr":
                found[node] = self.small_constant(getattr(traced, node.target))
            elif node.op == "call_function":
                found[node] = self._copied(node, found, before, stack)
        return [found[node] for node in traced.graph.output_node().args[0]]

    def _copied(self, node: fx.Node, found: Mapping[fx.Node, Any], before: fx.Node, stack: Any) -> fx.Node:
        source = aten.hands_on(node) if "val" in node.meta else None
        if source is not None:
            return found[source]
        with self.graph.inserting_before(before):
            made = self.graph.node_copy(node, lambda operand: found[operand])
        made.meta = {name: node.meta[name] for name in ("val",) if name in node.meta}
        if stack is not None:
            made.meta["nn_module_stack"] = stack
        self.made.add(made)
        return made

    # ---- weights

    def weight(self, name: str, tensor: Tensor) -> fx.Node:
        """A new parameter of the program."""
        self.state[name] = Parameter(tensor, requires_grad=False)
        return self.lift(InputKind.PARAMETER, "p", name, self.state[name])

    def small_constant(self, tensor: Tensor) -> fx.Node:
        """A constant that the trace met: the columns of a table, the blocks of its bands. Equal ones are one."""
        key = (tensor.dtype, tuple(tensor.shape), tuple(tensor.flatten().tolist()))
        if key not in self.small:
            name = _free("mla_pass_constant_{}", self.constants)
            self.constants[name] = tensor
            self.small[key] = self.lift(InputKind.CONSTANT_TENSOR, "c", name, tensor)
        return self.small[key]

    def rope_tables(self, rope: Rope) -> dict[str, fx.Node]:
        """cos and sin of every frequency at every position, float32 [max_positions, R/2], shared by equal ropes."""
        for known, nodes in self.tables:
            if np.array_equal(known.theta, rope.theta):
                return nodes
        # The angle is rounded to float32 before the cosine is taken, as the models do.
        angle = np.outer(np.arange(self.max_positions, dtype=np.float32), rope.theta.astype(np.float32))
        made = {}
        for kind, function in (("cos", np.cos), ("sin", np.sin)):
            table = as_torch(function(angle.astype(np.float64)), torch.float32).to(self.inputs[0].meta["val"].device)
            made[kind] = self.weight(_free(f"{TABLES}{{}}.{kind}", self.state), table)
        self.tables.append((rope, made))
        return made

    def lift(self, kind: InputKind, prefix: str, name: str, tensor: Tensor) -> fx.Node:
        """The placeholder that stands for a tensor, before the inputs that users give."""
        with self.graph.inserting_before(self.inputs[0]):
            node = self.graph.placeholder(f"{prefix}_{name.replace('.', '_')}")
        node.meta["val"] = self.fake.from_tensor(tensor, static_shapes=True)
        place = next(i for i, spec in enumerate(self.signature.input_specs) if spec.kind == InputKind.USER_INPUT)
        self.signature.input_specs.insert(place, InputSpec(kind, TensorArgument(name=node.name), name))
        return node

    # ---- the whole program

    def finished(self) -> ExportedProgram:
        """The program around the new graph. Raises MlaPassError when something still reads keys or values."""
        # Nothing in a functional program has an effect; attention counts as if it had, as it could drop out at random.
        self.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
        self.check_caches()
        self.drop_unread_weights()
        self.graph.lint()
        return _program(self.program, self.graph, self.signature, self.state, self.constants, self.renamed)

    def check_caches(self) -> None:
        """Raises MlaPassError when an input that holds rows by now is read for more than its sizes."""
        for node, site in self.rows.items():
            for user in node.users:
                sizes = aten.name_of(user) == "aten.sym_size" and user.args[1] in (0, 2)  # the same in either cache
                if user not in self.made and not sizes:
                    raise MlaPassError(
                        f"{site.name}: {user.name} ({aten.name_of(user)}) still reads {node.name}, which the "
                        "conversion replaces; expected only the attention to read a cache"
                    )

    def drop_unread_weights(self) -> None:
        """Remove the placeholders of weights that nothing reads, and the tensors that no other stands for."""
        specs = self.signature.input_specs
        unread = {
            node.name: node
            for node, spec in zip(self.graph.find_nodes(op="placeholder"), specs, strict=True)
            if spec.kind in LIFTED and not node.users
        }
        for node in unread.values():
            self.graph.erase_node(node)
        dropped = {spec.target for spec in specs if spec.arg.name in unread}
        specs[:] = [spec for spec in specs if spec.arg.name not in unread]
        for name in dropped - {spec.target for spec in specs}:
            self.state.pop(name, None)
            self.constants.pop(name, None)


def _free(name: str, taken: Mapping[str, Any]) -> str:
    """A name with the first number that is not taken, as a program may be converted in steps."""
    return next(found for number in count() if (found := name.format(number)) not in taken)


def output_product(view: FxView, site: AttentionSite) -> fx.Node:
    """The value behind the output projection and its bias. Raises MlaPassError when it is projected in another way."""
    readers = view.users(site.context)
    if len(readers) != 1 or view.op(readers[0]) not in ("matmul", "gemm"):
        raise MlaPassError(
            f"{site.name}: absorb folds value_up into the output projection, but the context is read by "
            f"{', '.join(view.node(reader) for reader in readers)}; use absorb='never'"
        )
    product = readers[0]
    if site.output.bias is None or len(view.inputs(product)) > 2:
        return product
    adders = view.users(product)
    if len(adders) != 1 or view.op(adders[0]) != "add":
        raise MlaPassError(f"{site.name}: the output projection's bias is not a single add; use absorb='never'")
    return adders[0]


def _program(
    program: ExportedProgram, graph: fx.Graph, signature: Any, state: dict[str, Any], constants: dict[str, Any],
    renamed: Mapping[str, str],
) -> ExportedProgram:  # fmt: skip
    """`program` with another graph, in which some inputs and outputs have new names."""
    calls = copy.deepcopy(program.module_call_graph)
    for call in calls:
        for argument in (*call.signature.inputs, *call.signature.outputs) if call.signature else ():
            argument.name = renamed.get(argument.name, argument.name)
    for spec in (*signature.input_specs, *signature.output_specs):
        spec.arg.name = renamed.get(spec.arg.name, spec.arg.name)
    return ExportedProgram(
        program.graph_module, graph, signature, state, dict(program.range_constraints), calls,
        _examples(program, graph), constants, verifiers=program.verifiers,
    )  # fmt: skip


def _examples(program: ExportedProgram, graph: fx.Graph) -> Any:
    """The example inputs; zeros where an input is of another size by now."""
    if program.example_inputs is None:
        return None
    given, spec = pytree.tree_flatten(program.example_inputs)
    names = {node.name: node.meta["val"] for node in graph.find_nodes(op="placeholder")}
    fitted = []
    for name, x in zip(program.graph_signature.user_inputs, given, strict=True):
        now = names.get(name)
        if isinstance(x, Tensor) and isinstance(now, Tensor):
            sizes = [n if isinstance(n, int) else old for n, old in zip(now.shape, x.shape, strict=True)]
            x = x if (list(x.shape), x.dtype) == (sizes, now.dtype) else x.new_zeros(sizes, dtype=now.dtype)
        fitted.append(x)
    return pytree.tree_unflatten(fitted, spec)
