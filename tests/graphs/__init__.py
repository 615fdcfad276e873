"""Small attention blocks as the exporters write them, in ONNX's own text format.

Each file is one block, from the hidden state to the output projection. Its first lines are comments: what it is, and
after ``expect:`` the summary of every site, or the beginning of the refusal. Weights are inputs in the text, named in
the metadata, and become random initializers here. Types and shapes of values in between are left out, as in many files
people have.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

FOLDER = Path(__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("*.onnxtxt"))


def load(name: str) -> tuple[ir.Model, list[str]]:
    """A golden graph with random weights, and the lines expected of `find_sites`."""
    text = (FOLDER / f"{name}.onnxtxt").read_text()
    expected = [line.removeprefix("# expect: ") for line in text.splitlines() if line.startswith("# expect: ")]
    proto = onnx.parser.parse_model(text)
    told = {entry.key: entry.value for entry in proto.metadata_props}
    model = ir.from_proto(proto)
    rng = np.random.default_rng(0)
    for value in [value for value in model.graph.inputs if value.name in told["random_weights"].split()]:
        shape = tuple(int(size) for size in value.shape.numpy())
        array = rng.normal(scale=shape[0] ** -0.5, size=shape).astype(np.float32)
        value.const_value = ir.tensor(array, name=value.name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    return model, expected
