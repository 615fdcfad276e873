"""A one-layer latent-attention model that keeps the folder contracts, and the same model in plain numpy.

It is written by hand so that the runtime side is tested against something that the converter had no part in: with a
shared cache as converted models have it, or a growing one as originals have it. Its logits depend on every cached row
and on the positions as such, not only on their differences (the rope part of a row is moved by the sine of its own).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

HIDDEN = 12
BOS, EOS = 256, 257


@dataclass(frozen=True)
class Weights:
    """embed [vocab, E]; latent [E, rank]; rope [E, rope_dim]; query [E, rank + rope_dim]; out [rank + E, vocab]."""

    embed: np.ndarray
    latent: np.ndarray
    rope: np.ndarray
    query: np.ndarray
    out: np.ndarray


def weights(vocab: int = 61, rank: int = 6, rope_dim: int = 2, seed: int = 0) -> Weights:
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape) / np.sqrt(shape[0])

    return Weights(
        embed=rng.standard_normal((vocab, HIDDEN)),
        latent=draw(HIDDEN, rank) * 2,
        rope=draw(HIDDEN, rope_dim),
        query=draw(HIDDEN, rank + rope_dim),
        out=draw(rank + HIDDEN, vocab) * 3,
    )


def reference(w: Weights, tokens: np.ndarray) -> np.ndarray:
    """Logits [S, vocab] of one unpadded sequence in float64, one token after the other."""
    x = w.embed[tokens]
    positions = np.arange(len(tokens))[:, None]
    rows = np.concatenate([x @ w.latent, x @ w.rope + np.sin(positions)], axis=1)
    logits = []
    for t in range(len(tokens)):
        scores = rows[: t + 1] @ (x[t] @ w.query)
        p = np.exp(scores - scores.max())
        context = (p / p.sum()) @ rows[: t + 1, : w.latent.shape[1]]
        logits.append(np.concatenate([context, x[t]]) @ w.out)
    return np.array(logits)


def save(folder: Path, w: Weights, cache_type: int = TensorProto.FLOAT, shared: bool = True) -> Path:
    """Write the model as ``folder/model.onnx`` with cache tensors of `cache_type`; it computes in float32."""
    rank, rope_dim = w.latent.shape[1], w.rope.shape[1]
    initializers = [
        numpy_helper.from_array(np.asarray(getattr(w, name), np.float32), name)
        for name in ("embed", "latent", "rope", "query", "out")
    ]
    nodes: list[onnx.NodeProto] = []

    def add(op: str, inputs: list[str], output: str, **attributes: object) -> str:
        nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def const(name: str, values: object, dtype: type = np.int64) -> str:
        initializers.append(numpy_helper.from_array(np.array(values, dtype), name))
        return name

    zero, one, two = (const(name, [i]) for i, name in enumerate(("zero", "one", "two")))
    f32 = TensorProto.FLOAT
    x = add("Gather", ["embed", "input_ids"], "x", axis=0)
    position = add("Unsqueeze", [add("Cast", ["position_ids"], "position_f", to=f32), two], "position_BS1")
    shift = add("Sin", [position], "shift")
    total = add("Shape", ["attention_mask"], "total", start=1, end=2)
    batch = add("Shape", ["input_ids"], "batch", start=0, end=1)
    new = add("Shape", ["input_ids"], "new", start=1, end=2)
    past = add("Sub", [total, new], "past")
    index = add("Expand", [past, batch], "write_at")

    def cached(name: str, row: str) -> str:
        stored = add("Cast", [add("Unsqueeze", [row, one], f"{name}_B1SW")], f"{name}_stored", to=cache_type)
        present = f"present.0.{name}"
        if not shared:
            add("Concat", [f"past.0.{name}", stored], present, axis=2)
            return add("Cast", [present], f"{name}_all", to=f32)
        add("TensorScatter", [f"past.0.{name}", stored, index], present, axis=2)
        return add("Cast", [add("Slice", [present, zero, total, two], f"{name}_live")], f"{name}_all", to=f32)

    c = cached("latent", add("MatMul", [x, "latent"], "latent_row"))
    r = cached("rope", add("Add", [add("MatMul", [x, "rope"], "rope_part"), shift], "rope_row"))
    rows = add("Concat", [c, r], "rows", axis=3)
    q = add("Unsqueeze", [add("MatMul", [x, "query"], "q_BSW"), one], "q")
    scores = add("MatMul", [q, add("Transpose", [rows], "rows_t", perm=[0, 1, 3, 2])], "scores")

    def count(start: str, end: str, name: str, axis: str) -> str:
        scalars = [add("Squeeze", [value], f"{name}_{value}") for value in (start, end)]
        return add("Unsqueeze", [add("Range", [*scalars, const(f"{name}_step", 1)], f"{name}_line"), axis], name)

    causal = add("LessOrEqual", [count(zero, total, "key_1T", zero), count(past, total, "query_S1", one)], "causal")
    keep = add("Cast", ["attention_mask"], "keep", to=TensorProto.BOOL)
    visible = add("And", [causal, add("Unsqueeze", [keep, const("one_two", [1, 2])], "keep_B11T")], "visible")
    masked = add("Where", [visible, scores, const("hidden", -1e9, np.float32)], "masked")
    context = add("MatMul", [add("Softmax", [masked], "p", axis=-1), c], "context_B1SR")
    full = add("Concat", [add("Squeeze", [context, one], "context"), x], "full", axis=2)
    add("MatMul", [full, "out"], "logits")

    def ports(prefix: str, rows: str) -> list[onnx.ValueInfoProto]:
        return [
            helper.make_tensor_value_info(f"{prefix}.0.{name}", cache_type, ["batch", 1, rows, width])
            for name, width in (("latent", rank), ("rope", rope_dim))
        ]

    tokens = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", length])
        for name, length in (("input_ids", "sequence"), ("attention_mask", "total"), ("position_ids", "sequence"))
    ]
    inputs, outputs = ports("past", "capacity" if shared else "past"), ports("present", "capacity" if shared else "all")
    logits = helper.make_tensor_value_info("logits", f32, ["batch", "sequence", w.embed.shape[0]])
    graph = helper.make_graph(nodes, "toy", tokens + inputs, [logits, *outputs], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)
    helper.set_model_props(model, {"mla_pass.max_position": "4096"})
    onnx.checker.check_model(model, full_check=True)
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, folder / "model.onnx")
    return folder


def save_tokenizer(folder: Path, bos: bool = False) -> int:
    """A tokenizer of single bytes beside the model: ids 0-255 are UTF-8 bytes in the library's order, then <s>, </s>.

    With `bos` it puts <s> before a text by itself. Returns the size of its vocabulary.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>"])
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    made.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": BOS, "eos_token_id": [EOS]}))
    return made.get_vocab_size()
