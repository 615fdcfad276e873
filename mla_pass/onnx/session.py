"""Running a model on plain ONNX Runtime: what its cache is, and a decoder that keeps that cache in place.

What the cache is follows from the graph's inputs and outputs alone (`onnx.ports`), for original and converted models
alike.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from mla_pass import native
from mla_pass.errors import MlaPassError
from mla_pass.onnx.body import DOMAIN, OP_TYPE
from mla_pass.onnx.ports import FLOATS, CacheSpec, CacheTensor, read_ports

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
_DEVICES = {CPU: "cpu", CUDA: "cuda"}
_FLOAT_KINDS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE)


@dataclass(frozen=True)
class ModelSession:
    """An open model; made by :func:`session`."""

    ort: Any
    """The plain ``onnxruntime.InferenceSession``."""
    path: Path
    """The .onnx file."""
    cache: CacheSpec
    tokens: dict[str, np.dtype]
    """Token inputs the graph has, and their integer types."""
    logits_name: str
    logits_dtype: np.dtype
    vocab: int | None
    """Size of the logits, where the graph states it."""
    max_position: int | None
    """Number of positions the model was made for, where its metadata states it."""
    device: str
    """Where the cache lives: ``cpu`` or ``cuda``."""
    fused: bool
    """Whether LatentAttention, where the graph has it, runs as the fused kernel of the op library."""

    @property
    def folder(self) -> Path:
        """Where tokenizer and configuration lie."""
        return self.path.parent

    @property
    def bytes_per_token(self) -> int:
        """Cache bytes of one token of one sequence, from the graph's own shapes."""
        return self.cache.bytes_per_token

    def logits(self, input_ids: npt.ArrayLike, attention_mask: npt.ArrayLike | None = None) -> np.ndarray:
        """Forward pass over an empty cache.

        `input_ids` [B, S] or [S]; `attention_mask` [B, S], 1 where a token may be attended (default: everywhere).
        Returns float32 [B, S, vocab]. Raises MlaPassError for ids that are not integers of the vocabulary.
        """
        ids = as_ids(input_ids, self.vocab)
        return Decoder(self, ids.shape[0], ids.shape[1]).forward(ids, attention_mask)


def session(
    folder: str | Path,
    *,
    threads: int | None = None,
    providers: Sequence[str] = (CPU,),
    fused: bool | None = None,
) -> ModelSession:
    """Open ``folder/model.onnx`` (or a path to an .onnx file) with ONNX Runtime.

    `threads` bounds the threads inside an operator; None leaves the choice to ONNX Runtime. `providers` are
    execution provider names, best first; the cache lives on the device of the first. `fused` says whether
    LatentAttention runs as the op library's kernel or as the model's own function of stock operators; None takes the
    kernel where the library is built and has one for the first provider: for the CPU's always, for CUDA's where it was
    built with CUDA's compiler and the model computes in float16 or bfloat16.
    Raises MlaPassError when the file is missing or cannot be run, when a provider or the library asked for is not
    available, or when the graph's inputs and outputs are not those of a language model with a flat cache.
    """
    path = model_path(folder)
    if threads is not None and threads < 1:
        raise MlaPassError(f"threads is {threads}; expected a number of at least 1, or none to let ONNX Runtime choose")
    runtime = _onnxruntime()
    options = runtime.SessionOptions()
    # Warnings speak of graph clean-up that no user can act on. Errors are logged *and* come back, as an exception
    # or, for a provider that is not there, in get_providers(): both are told below, once. What is left is fatal.
    options.log_severity_level = 4
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    unknown = [name for name in providers if name not in runtime.get_available_providers()]
    if unknown or not providers:
        raise MlaPassError(
            f"execution providers {list(providers)}: this ONNX Runtime offers {runtime.get_available_providers()}; "
            "choose among these, or install the extra mla-pass[cuda] in place of mla-pass[cpu] for CUDA"
        )
    if CUDA in providers:
        runtime.preload_dlls()  # CUDA's own libraries, where they are Python packages
    library = _op_library(fused, providers[0], path)
    with ort_errors(f"ONNX Runtime {runtime.__version__} cannot open {path}"):
        if library is not None:
            options.register_custom_ops_library(library)
        ort = runtime.InferenceSession(str(path), options, providers=list(providers))
    missing = [name for name in providers if name not in ort.get_providers()]
    if missing:
        raise MlaPassError(
            f"ONNX Runtime could not start {missing} and fell back to {ort.get_providers()}; "
            "check that the driver and the CUDA libraries are installed, or leave the provider out"
        )
    return _describe(ort, path, _DEVICES.get(providers[0], "cpu"), library is not None)


def _op_library(fused: bool | None, provider: str, path: Path) -> str | None:
    """Path of the op library to register, None for the function of stock operators.

    Once registered there is no way back to the function: on a device the library has no kernel for, every layer would
    copy its cache to the CPU.
    """
    if fused is False:
        return None
    library = native.library_path() if fused else native.find_library()
    if library is None:
        return None
    reason = _without_kernel(provider, path)
    if reason and fused:
        raise MlaPassError(f"{reason}, or fused=False")
    return None if reason else library


def _without_kernel(provider: str, path: Path) -> str:
    """Why the op library has no kernel for the model's LatentAttention nodes on that provider; "" where it has."""
    if provider == CPU:
        return ""
    if provider != CUDA:
        return f"the op library has no kernel for {provider}; expected {CPU} or {CUDA}"
    if not native.cuda_capabilities():
        return (
            "the op library was built without CUDA kernels; expected CUDA's compiler, nvcc, when mla_pass is installed"
        )
    wide = computes_in(path) - {"float16", "bfloat16"}
    if wide:
        return f"{path} computes attention in {', '.join(sorted(wide))}; expected float16 or bfloat16 for CUDA kernels"
    return ""


def computes_in(path: Path) -> set[str]:
    """Types that the model's LatentAttention nodes compute in, read off what their queries are made of."""
    graph = onnx.load(path, load_external_data=False).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in graph.input}
    kinds |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    found = set()
    for node in graph.node:
        if node.domain == DOMAIN and node.op_type == OP_TYPE:
            found.add(_kind_behind(node.input[0], kinds, makers))
    return {onnx.helper.tensor_dtype_to_np_dtype(kind).name for kind in found if kind is not None}


def _kind_behind(name: str, kinds: dict[str, int], makers: dict[str, onnx.NodeProto]) -> int | None:
    """Element type of a float value: that of the nearest float input or constant behind it, or what it is cast to."""
    near, seen = deque([name]), {name}
    while near:
        value = near.popleft()
        if kinds.get(value) in _FLOAT_KINDS:
            return kinds[value]
        node = makers.get(value)
        if node is None:
            continue
        cast = next((a.i for a in node.attribute if node.op_type == "Cast" and a.name == "to"), None)
        if cast in _FLOAT_KINDS:
            return cast
        behind = [x for x in node.input if x and x not in seen]
        seen.update(behind)
        near.extend(behind)
    return None


def model_path(folder: str | Path) -> Path:
    """The .onnx file that `folder` (a folder, or the file itself) stands for."""
    path = Path(folder)
    if path.is_dir():
        path = path / "model.onnx"
    if not path.is_file():
        raise MlaPassError(f"{path} does not exist; expected a model folder with model.onnx in it, or an .onnx file")
    return path


def _describe(ort: Any, path: Path, device: str, fused: bool) -> ModelSession:
    cache, tokens, logits = read_ports(ort.get_inputs(), ort.get_outputs())
    limit = ort.get_modelmeta().custom_metadata_map.get("mla_pass.max_position")
    vocab = logits.shape[2]
    return ModelSession(
        ort=ort,
        path=path,
        cache=cache,
        tokens=tokens,
        logits_name=logits.name,
        logits_dtype=FLOATS[logits.type],
        vocab=vocab if isinstance(vocab, int) else None,
        max_position=int(limit) if limit is not None else None,
        device=device,
        fused=fused,
    )


class Decoder:
    """A session with a live cache: feed tokens, get logits; the cache never passes through numpy.

    A shared tensor is one OrtValue of `capacity` rows, allocated here once and bound as input and output of every run.
    A growing tensor is whatever OrtValue the last run returned, bound as the next run's input. `capacity` bounds the
    tokens per sequence for both.
    """

    def __init__(self, session: ModelSession, batch: int, capacity: int) -> None:
        if batch < 1 or capacity < 1:
            raise MlaPassError(f"batch is {batch} and capacity {capacity}; expected at least 1 of each")
        self.session = session
        self.batch = batch
        self.capacity = capacity
        self.length = 0
        """Tokens per sequence the cache holds, padding included."""
        self.cache: dict[str, Any] = {}
        """The live OrtValue of each cache tensor, by the name of its input."""
        self._mask = np.ones((batch, 0), np.int64)
        for tensor in session.cache.tensors:
            rows = capacity if tensor.kind == "shared" else 0
            self.cache[tensor.past] = self._allocate(tensor, rows)

    def reset(self) -> None:
        """Forget all tokens. Shared buffers stay allocated; rows that are not counted are never read."""
        self.length = 0
        self._mask = np.ones((self.batch, 0), np.int64)
        for tensor in self.session.cache.tensors:
            if tensor.kind == "growing":
                self.cache[tensor.past] = self._allocate(tensor, 0)

    def forward(
        self,
        input_ids: npt.ArrayLike,
        attention_mask: npt.ArrayLike | None = None,
        position_ids: npt.ArrayLike | None = None,
    ) -> np.ndarray:
        """Append tokens [B, S] and return their logits, float32 [B, S, vocab].

        `attention_mask` [B, T] covers all tokens, cached ones first; without it the new tokens are attended and
        earlier ones stay as they were. `position_ids` [B, S] default to the count of attended tokens before each.
        """
        return self._run(input_ids, attention_mask, position_ids, last_only=False)

    def prefill(
        self, input_ids: npt.ArrayLike, attention_mask: npt.ArrayLike | None = None, chunk: int | None = None
    ) -> np.ndarray:
        """Append a prompt [B, S], `chunk` tokens a run (all at once by default); logits of its last token [B, vocab].

        `attention_mask` is [B, T] as in :meth:`forward`.
        """
        if chunk is not None and chunk < 1:
            raise MlaPassError(f"the prefill chunk is {chunk}; expected at least 1 token")
        ids = as_ids(input_ids, self.session.vocab)
        mask = self._full_mask(ids, attention_mask)
        size, start = chunk or ids.shape[1], self.length
        for first in range(0, ids.shape[1], size):
            piece = ids[:, first : first + size]
            last = self._run(piece, mask[:, : start + first + piece.shape[1]], None, last_only=True)
        return last[:, 0]

    def step(self, tokens: npt.ArrayLike) -> np.ndarray:
        """Append one token to each sequence, [B]; returns logits [B, vocab]."""
        ids = np.asarray(tokens)
        if ids.shape != (self.batch,):
            raise MlaPassError(f"a step was given tokens of shape {ids.shape}; expected ({self.batch},), one each")
        return self._run(ids[:, None], None, None, last_only=True)[:, 0]

    def cache_bytes_per_token(self) -> float:
        """Bytes of the live cache tensors over the rows they have room for and the batch, summed over tensors.

        Measured on the OrtValues themselves. 0 before the first token of a model whose cache grows.
        """
        live = [(value.tensor_size_in_bytes(), value.shape()[2]) for value in self.cache.values()]
        return sum(size / rows for size, rows in live if rows) / self.batch

    def _run(
        self,
        input_ids: npt.ArrayLike,
        attention_mask: npt.ArrayLike | None,
        position_ids: npt.ArrayLike | None,
        last_only: bool,
    ) -> np.ndarray:
        ids = as_ids(input_ids, self.session.vocab)
        mask = self._full_mask(ids, attention_mask)
        positions = self._positions(ids, mask, position_ids)
        binding = self._bind({"input_ids": ids, "attention_mask": mask, "position_ids": positions})
        with ort_errors(f"ONNX Runtime could not run {self.session.path}"):
            self.session.ort.run_with_iobinding(binding)
        logits, *presents = binding.get_outputs()
        # The binding holds the old cache, and the new values hold the binding: let the old cache go now.
        binding.clear_binding_inputs()
        for tensor, value in zip(self._growing(), presents, strict=False):
            self.cache[tensor.past] = value
        self.length, self._mask = mask.shape[1], mask
        values = host_view(logits, self.session.logits_dtype)
        return (values[:, -1:] if last_only else values).astype(np.float32)

    def _bind(self, feeds: dict[str, np.ndarray]) -> Any:
        """Outputs in the order logits, growing tensors, shared tensors.

        Each run has a fresh binding, since the values got from a binding change when that binding is bound anew.
        """
        session, device = self.session, self.session.device
        binding = session.ort.io_binding()
        for name, dtype in session.tokens.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(feeds[name], dtype))
        binding.bind_output(session.logits_name, "cpu")
        for tensor in self._growing():
            binding.bind_output(tensor.present, device)
        for tensor in session.cache.tensors:
            value = self.cache[tensor.past]
            binding.bind_ortvalue_input(tensor.past, value)
            if tensor.kind == "shared":
                binding.bind_ortvalue_output(tensor.present, value)
        return binding

    def _growing(self) -> list[CacheTensor]:
        return [tensor for tensor in self.session.cache.tensors if tensor.kind == "growing"]

    def _full_mask(self, ids: np.ndarray, attention_mask: npt.ArrayLike | None) -> np.ndarray:
        batch, new = ids.shape
        total = self.length + new
        if batch != self.batch:
            raise MlaPassError(f"input_ids hold {batch} sequences; this decoder was made for {self.batch}")
        if total > self.capacity:
            raise MlaPassError(
                f"{self.length} cached and {new} new tokens exceed the cache's {self.capacity} rows; "
                "ask for a larger capacity"
            )
        if self.length and not self.session.cache.tensors:
            raise MlaPassError(f"{self.session.path} has no cache inputs; it can only be run once, from empty")
        if attention_mask is None:
            return np.concatenate([self._mask, np.ones((batch, new), np.int64)], axis=1)
        mask = np.asarray(attention_mask)
        if mask.shape != (batch, total):
            raise MlaPassError(
                f"attention_mask has shape {mask.shape}; expected {(batch, total)}: every cached and new token"
            )
        if not np.isin(mask, (0, 1)).all():
            raise MlaPassError("attention_mask holds other values than 0 (hidden) and 1 (attended)")
        if "attention_mask" not in self.session.tokens and not mask.all():
            raise MlaPassError(f"{self.session.path} has no attention_mask input; it cannot run padded sequences")
        return mask.astype(np.int64)

    def _positions(self, ids: np.ndarray, mask: np.ndarray, position_ids: npt.ArrayLike | None) -> np.ndarray:
        if position_ids is None:
            positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, self.length :]
        else:
            positions = np.asarray(position_ids)
            if positions.shape != ids.shape or not np.issubdtype(positions.dtype, np.integer):
                raise MlaPassError(
                    f"position_ids are {positions.dtype} {positions.shape}; expected integers {ids.shape}"
                )
        limit = self.session.max_position
        if limit is not None and positions.size and positions.max() >= limit:
            raise MlaPassError(
                f"position {positions.max()} lies beyond the model's {limit} positions; give it fewer tokens"
            )
        return positions

    def _allocate(self, tensor: CacheTensor, rows: int) -> Any:
        return allocate(tensor, self.batch, rows, self.session.device)


def allocate(tensor: CacheTensor, batch: int, rows: int, device: str = "cpu") -> Any:
    """An OrtValue for a cache: zeros on the CPU; on another device rows as they come, as nobody reads one not written.

    Every type that ONNX Runtime has will do, those that numpy lacks included.
    """
    kind = int(onnx.helper.np_dtype_to_tensor_dtype(tensor.dtype))
    shape = [batch, tensor.heads, rows, tensor.width]
    value = _onnxruntime().OrtValue.ortvalue_from_shape_and_type(shape, kind, device)
    if rows and device == "cpu":
        ctypes.memset(value.data_ptr(), 0, value.tensor_size_in_bytes())
    return value


def value_of(array: np.ndarray) -> Any:
    """An OrtValue of a numpy array, on the CPU."""
    return _onnxruntime().OrtValue.ortvalue_from_numpy(array)


def as_ids(input_ids: npt.ArrayLike, vocab: int | None) -> np.ndarray:
    """Token ids as int64 [B, S] (a flat list is one sequence), each checked against the vocabulary."""
    try:
        ids = np.asarray(input_ids)
    except ValueError as error:
        raise MlaPassError("token ids are ragged; expected sequences of one length (pad them on the left)") from error
    if ids.ndim == 1:
        ids = ids[None]
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer) or ids.size == 0:
        raise MlaPassError(f"token ids are {ids.dtype} of shape {ids.shape}; expected integers [batch, tokens]")
    if ids.min() < 0 or (vocab is not None and ids.max() >= vocab):
        top = "the vocabulary" if vocab is None else str(vocab - 1)
        raise MlaPassError(f"token ids run from {ids.min()} to {ids.max()}; expected 0 to {top}")
    return ids.astype(np.int64)


def host_view(value: Any, dtype: np.dtype) -> np.ndarray:
    """An OrtValue in host memory as an array, without a copy (numpy has no bfloat16, so .numpy() cannot serve).

    The array is valid while the value lives.
    """
    shape = tuple(value.shape())
    size = int(np.prod(shape)) * dtype.itemsize
    if size == 0:
        return np.zeros(shape, dtype)
    memory = memoryview((ctypes.c_ubyte * size).from_address(value.data_ptr()))
    return np.ndarray(shape, dtype, memory)


@contextmanager
def ort_errors(doing: str) -> Iterator[None]:
    """Turn what ONNX Runtime raises into one sentence that starts with `doing`."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    kinds = (
        state.Fail, state.InvalidArgument, state.InvalidGraph, state.InvalidProtobuf, state.NoSuchFile, state.NoModel,
        state.NotImplemented, state.RuntimeException, state.EPFail, state.EngineError,
    )  # fmt: skip
    try:
        yield
    except kinds as error:
        told = str(error).strip()
        advice = ""
        if isinstance(error, state.NotImplemented):
            advice = (
                "; this provider has no kernel for that operator in that element type: export the model as float32, "
                "and convert it without --target, which is for CUDA servers"
            )
        elif isinstance(error, state.InvalidProtobuf):
            advice = "; expected an ONNX model"
        raise MlaPassError(f"{doing}: {told.splitlines()[0] if told else type(error).__name__}{advice}") from error


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MlaPassError(
            "running a model needs ONNX Runtime; install the extra: pip install 'mla-pass[cpu]' (or mla-pass[cuda])"
        ) from error
    return onnxruntime
