"""Healing of an exported program: both graphs run node by node, trained weights into a program beside the given one."""

from __future__ import annotations

import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.nn import Parameter

from mla_pass.errors import MlaPassError
from mla_pass.export.fx import core_aten
from mla_pass.export.tracing import first_line
from mla_pass.healing.distill import PRODUCTS, before_logits
from mla_pass.healing.subject import Subject, Trainable
from mla_pass.patterns import find_sites
from mla_pass.pytorch.block import ROW_WEIGHT
from mla_pass.pytorch.emit import TABLES, copied
from mla_pass.pytorch.inputs import fed, roles_of
from mla_pass.pytorch.piece import Piece, reached
from mla_pass.pytorch.view import FxView, lifted_names, writing
from mla_pass.site import AttentionSite
from mla_pass.view import EvaluationError

FILE = "model.pt2"
MARK = f".{ROW_WEIGHT}"
"""What the name of a weight ends with that every converted block has; before it stands the block's own name."""
_LAYOUT = ("reshape", "transpose", "unsqueeze", "squeeze", "expand", "cast")


class ProgramSubject(Subject):
    """An original and a converted program, in memory or in the files that torch.export.save wrote."""

    def __init__(self, original: Any, converted: Any, device: str) -> None:
        """Raises MlaPassError when one cannot be read, its inputs are unknown, or the second is not converted."""
        self._given = original, converted
        self._programs = opened(original), opened(converted)
        views = [view_of(program) for program in self._programs]
        trainable, self._roles = find_trainable(views[1]), input_roles(views[0])
        counts = [len(user_inputs(view.program)) for view in views]
        if counts[0] != counts[1]:
            raise MlaPassError(
                f"the original program has {counts[0]} inputs, the converted one {counts[1]}; expected two versions of "
                "one model"
            )
        tables = [x.shape[0] for name, x in self._programs[1].state_dict.items() if name.startswith(TABLES)]
        self._settled: dict[str, Tensor] = {}
        super().__init__(
            ProgramPredictor(views[0], self._roles, (), device),
            ProgramPredictor(views[1], self._roles, trainable.names, device), trainable,
            tuple(n for n in (views[0].max_position, *tables) if n is not None),
            str(original) if isinstance(original, (str, Path)) else "a program in memory",
        )  # fmt: skip

    def sources(self) -> Iterator[Path | bytes]:
        """See `Subject.sources`."""
        for given, program in zip(self._given, self._programs, strict=True):
            if isinstance(given, (str, Path)):
                yield Path(given)
                continue
            yield str(program.graph).encode()
            for name, tensor in sorted({**program.state_dict, **program.constants}.items()):
                yield name.encode()
                yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    def tokens(self, text: Path) -> tuple[np.ndarray, int | None]:
        """A program has no tokenizer: raises MlaPassError."""
        raise MlaPassError(f"an exported program has no tokenizer to read {text} with; give token ids, in .npy")

    def written(self, rows: int, length: int) -> np.ndarray:
        """A program knows no token that opens a text: raises MlaPassError."""
        raise MlaPassError("an exported program cannot write a text to be healed on; give token ids, in .npy")

    def settle(self, name: str, weight: Tensor) -> Tensor:
        """See `Subject.settle`."""
        stored = self._programs[1].state_dict[name]
        self._settled[name] = weight.detach().to(stored.device, stored.dtype, copy=True)
        return self._settled[name].float()

    def write(self, folder: Path) -> None:
        """See `Subject.write`."""
        healed = copied(self._programs[1])
        for name, tensor in self._settled.items():
            healed.state_dict[name] = Parameter(tensor, requires_grad=False)
        with (folder / FILE).open("wb") as stream:
            torch.export.save(healed, stream)
        view = view_of(opened(folder / FILE))
        predictor = ProgramPredictor(view, self._roles, (), "cpu")
        with torch.no_grad():
            if not predictor.logits(predictor.hidden(torch.zeros(1, 3, dtype=torch.int64))).isfinite().all():
                raise MlaPassError("the healed program's logits are not finite; nothing was written")


class ProgramPredictor:
    """See `mla_pass.healing.subject.Predictor`. Half precision is computed in float32."""

    def __init__(self, view: FxView, roles: Mapping[int, str], trained: Collection[str], device: str) -> None:
        """`roles` as `input_roles` gives them; of the weights `trained` the predictor has copies of its own."""
        self._roles = roles
        self._inputs = user_inputs(view.program)
        self.parameters, weights = weights_of(view, trained, device)
        logits = logits_of(view)
        before = before_logits(view, logits)
        graph = view.program.graph
        self._body = Piece(graph, [before], (), weights, stopped=corrections(view), device=device)
        self._head = Piece(graph, [logits], [before], weights, device=device)
        try:
            with torch.no_grad():
                self.vocab = self.logits(self.hidden(torch.zeros(1, 1, dtype=torch.int64))).shape[-1]
        except EvaluationError as error:
            raise MlaPassError(f"the program cannot be run node by node: {error}") from error

    def hidden(self, ids: Tensor) -> Tensor:
        """See `Predictor.hidden`."""
        return self._body.compute(self._feeds(ids, self._body))[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Predictor.logits`."""
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64)
        return self._head.compute({self._head.given[0]: hidden, **self._feeds(ids, self._head)})[0]

    def _feeds(self, ids: Tensor, piece: Piece) -> dict[fx.Node, Tensor]:
        ids, needed = ids.cpu(), set(piece.needs)
        return {
            node: fed(node, self._roles.get(place, ""), ids)
            for place, node in enumerate(self._inputs)
            if node in needed
        }


def opened(program: Any) -> ExportedProgram:
    """A program, read where it is a file. Raises MlaPassError when it is none."""
    if not isinstance(program, (str, Path)):
        return program
    try:
        return torch.export.load(program)
    except (OSError, RuntimeError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise MlaPassError(f"{program} is no program that torch.export.save wrote: {first_line(error)}") from error


def view_of(program: Any) -> FxView:
    """A program to read, without what writes in place. Raises MlaPassError for anything else."""
    functional = core_aten(copied(program)) if isinstance(program, ExportedProgram) and writing(program) else program
    return FxView.of(functional)


# ---- inputs and outputs


def user_inputs(program: ExportedProgram) -> list[fx.Node]:
    """The inputs that a caller gives, in their order."""
    names = {name: place for place, name in enumerate(program.graph_signature.user_inputs)}
    nodes = [node for node in program.graph.find_nodes(op="placeholder") if node.name in names]
    return sorted(nodes, key=lambda node: names[node.name])


def input_roles(view: FxView) -> dict[int, str]:
    """What the inputs of the original program are, by their places; a conversion leaves them there.

    Raises MlaPassError when no attention block can be read, which would tell.
    """
    sites = [site for site in find_sites(view.program) if isinstance(site, AttentionSite)]
    if not sites:
        raise MlaPassError(
            "no attention block of the original program can be read, so its inputs are unknown; give the program that "
            "was converted"
        )
    known = roles_of(sites)
    return {place: known[node] for place, node in enumerate(user_inputs(view.program)) if node in known}


def logits_of(view: FxView) -> fx.Node:
    """The output [batch, tokens, vocabulary]. Raises MlaPassError unless there is one, and only one, of three axes."""
    outputs = {view.resolved(node) for node in view.program.graph.output_node().all_input_nodes}
    found = [node for node in outputs if len(view.shape(node) or ()) == 3]
    if len(found) != 1:
        raise MlaPassError(f"the program has {len(found)} outputs of three axes; expected one, the logits")
    return found[0]


def corrections(view: FxView) -> set[fx.Node]:
    """Every y - x that is nothing but added to x. x + (y - x) is y: so it is written, with a rounded y of 8 bits, for
    gradients to pass x as if it were y. An exported program keeps the sum, and not that y has no part in gradients."""
    found = set()
    for node in view.results():
        if view.op(node) == "sub" and [view.op(user) for user in view.users(node)] == ["add"]:
            others = [x for x in view.inputs(view.users(node)[0]) if x is not node]
            if others == [view.inputs(node)[1]]:
                found.add(node)
    return found


# ---- weights


def weights_of(
    view: FxView, trained: Collection[str], device: str
) -> tuple[dict[str, Tensor], dict[fx.Node, Tensor]]:
    """Floating-point weights by their names, float32, and all weights by the placeholders that stand for them.

    Those that share their data in the program share a tensor.
    """
    named, once = {}, {}
    placed: dict[fx.Node, Tensor] = {}
    for node, name in lifted_names(view.program).items():
        tensor = view.weights[node]
        if not tensor.is_floating_point():
            placed[node] = tensor
            continue
        if id(tensor) not in once:
            once[id(tensor)] = tensor.detach().to(device, torch.float32, copy=name in trained)
        placed[node] = named[name] = once[id(tensor)]
    return named, placed


def find_trainable(view: FxView) -> Trainable:
    """Matrices, biases and means of every converted block; keys and values that rows are encoded from stay.

    Raises MlaPassError when the program has no such block.
    """
    nodes = {name: node for node, name in lifted_names(view.program).items()}
    sites = [name.removesuffix(MARK) for name in nodes if name.endswith(MARK)]
    if not sites:
        raise MlaPassError("the program to heal has no latent attention; give one that mla_pass.convert returned")
    names, left_out = [], []
    for site in sites:
        inside = {name: node for name, node in nodes.items() if name.startswith(f"{site}.") and is_matrix(view, node)}
        rows = view.users(through_layout(view, nodes[f"{site}{MARK}"]))[0]
        before = reached([view.inputs(rows)[0]], set())
        for name, node in inside.items():
            readers = len(view.users(node))
            if readers > 1:
                left_out.append(f"{name} is read by {readers} nodes")
            elif node not in before:
                names.append(name)
    if not names:
        raise MlaPassError("every matrix of the latent attention is read elsewhere, too, so none can be healed")
    staggered = frozenset(name for name in names if name.endswith(".key_up"))
    return Trainable(tuple(names), tuple(left_out), staggered)


def is_matrix(view: FxView, node: fx.Node) -> bool:
    """Whether a weight is a factor of a product, or added to what varies; not so the weight of a norm."""
    if view.weights[node].numel() < 2 or not view.weights[node].is_floating_point():
        return False
    for reader in view.users(through_layout(view, node)):
        if view.op(reader) in PRODUCTS:
            return True
        if view.op(reader) == "add" and any(not view.is_constant(x) for x in view.inputs(reader)):
            return True
    return False


def through_layout(view: FxView, node: fx.Node) -> fx.Node:
    """What a value is once it lies as its only reader wants it."""
    readers = view.users(node)
    while len(readers) == 1 and view.op(readers[0]) in _LAYOUT:
        node = readers[0]
        readers = view.users(node)
    return node
