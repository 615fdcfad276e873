"""Exported graphs against the model itself in torch: eager attention, the whole text at once, no cache to get wrong."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mla_pass.errors import MlaPassError
from tests.families import FAMILIES, VOCAB, exported
from tests.limits import file_size_limit

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
ort = pytest.importorskip("onnxruntime")

import ml_dtypes  # noqa: E402
import onnx  # noqa: E402

import mla_pass.export.hf as hf  # noqa: E402
from mla_pass.export.hf import export_hf  # noqa: E402

SHAPES = [(1, 1, 7), (3, 4, 11), (2, 6, 0), (1, 2, 40)]  # batch, sequence, past
EPS = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
# rounding steps of the largest value: float32 against another order of summation over a whole model,
# the short ones against arithmetic in float32 on the same rounded weights
STEPS = {"float32": 64, "float16": 6, "bfloat16": 6}


def oracle(model: Any, batch: int, sequence: int, past: int) -> tuple[dict[str, np.ndarray], list[np.ndarray], Any]:
    """Feeds for the last `sequence` tokens, what the model says of them, and where there is no padding.

    Every row starts at a position of its own; row b has b tokens of padding on the left.
    """
    generator = torch.Generator().manual_seed(100 * batch + past)
    total = past + sequence
    ids = torch.randint(3, VOCAB, (batch, total), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(batch):
        mask[row, :row] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0) + 5 * torch.arange(batch)[:, None]
    model.set_attn_implementation("eager")

    def run(tokens: int) -> tuple[Any, list[Any]]:
        cache = transformers.DynamicCache()
        with torch.no_grad():
            result = model(input_ids=ids[:, :tokens], attention_mask=mask[:, :tokens],
                           position_ids=positions[:, :tokens], past_key_values=cache, use_cache=True)  # fmt: skip
        return result.logits, [t for layer in cache.layers for t in (layer.keys, layer.values)]

    logits, present = run(total)
    before = run(past)[1] if past else [t[:, :, :0] for t in present]
    layers = len(present) // 2
    names = [f"past_key_values.{i}.{kind}" for i in range(layers) for kind in ("key", "value")]
    feeds = {"input_ids": ids[:, past:], "attention_mask": mask, "position_ids": positions[:, past:]}
    feeds |= dict(zip(names, before, strict=True))
    return (
        {k: v.numpy() for k, v in feeds.items()},
        [t.numpy() for t in (logits[:, past:], *present)],
        mask.bool().numpy(),
    )


def assert_equal(found: list[np.ndarray], expected: list[np.ndarray], seen: np.ndarray, dtype: str) -> None:
    assert len(found) == len(expected)
    sequence = expected[0].shape[1]
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours.shape == theirs.shape
        assert str(ours.dtype) == dtype
        if i:
            ours, theirs = ours.swapaxes(1, 2)[seen], theirs.swapaxes(1, 2)[seen]
        else:
            ours, theirs = ours[seen[:, -sequence:]], theirs[seen[:, -sequence:]]
        bound = STEPS[dtype] * EPS[dtype] * np.abs(theirs).max()
        np.testing.assert_allclose(ours.astype(np.float32), theirs, rtol=0, atol=bound, err_msg=f"output {i}")


def rounded(family: str, dtype: str) -> Any:
    """The family's model in float32 arithmetic, its weights rounded to `dtype`."""
    model = FAMILIES[family]()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype)).float()
    return model


def session(folder: Path) -> Any:
    return ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])


SOFTCAP = pytest.param("gemma2", marks=pytest.mark.slow)
OPSETS = [(family, 18) for family in FAMILIES] + [
    *((family, opset) for opset in (23, 24) for family in ("llama", "qwen3")),
    *(pytest.param("gemma2", opset, marks=pytest.mark.slow) for opset in (23, 24)),
]  # fmt: skip


@pytest.mark.parametrize(("family", "opset"), OPSETS)
def test_equals_torch(family: str, opset: int) -> None:
    run = session(exported(family, opset)).run
    model = FAMILIES[family]()
    for shape in SHAPES:
        feeds, expected, seen = oracle(model, *shape)
        assert_equal(run(None, feeds), expected, seen, "float32")


@pytest.mark.parametrize("opset", [18, 23, 24])
def test_opset_is_the_one_asked_for(opset: int) -> None:
    imports = onnx.load(exported("llama", opset) / "model.onnx", load_external_data=False).opset_import
    assert [(entry.domain, entry.version) for entry in imports] == [("", opset)]


@pytest.mark.parametrize("family", ["llama", SOFTCAP])
def test_float16_equals_torch(family: str) -> None:
    run = session(exported(family, dtype="float16")).run
    model = rounded(family, "float16")
    for shape in SHAPES:
        feeds, expected, seen = oracle(model, *shape)
        feeds = {k: v.astype(np.float16) if v.dtype == np.float32 else v for k, v in feeds.items()}
        assert_equal(run(None, feeds), expected, seen, "float16")


@pytest.mark.parametrize("family", ["llama", SOFTCAP])
def test_bfloat16_equals_torch(family: str) -> None:
    """On ONNX's own reference evaluator: onnxruntime has no bfloat16 kernels on the CPU."""
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(onnx.load(exported(family, dtype="bfloat16") / "model.onnx"))
    model = rounded(family, "bfloat16")
    for shape in SHAPES:
        feeds, expected, seen = oracle(model, *shape)
        feeds = {k: v.astype(ml_dtypes.bfloat16) if v.dtype == np.float32 else v for k, v in feeds.items()}
        assert_equal(evaluator.run(None, feeds), expected, seen, "bfloat16")


def test_inputs_and_outputs_are_the_documented_ones() -> None:
    model = onnx.load(exported("gemma3") / "model.onnx", load_external_data=False)

    def signature(values: Any) -> dict[str, list[Any]]:
        return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}

    layers, kinds = range(4), ("key", "value")
    assert signature(model.graph.input) == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "total"],
        "position_ids": ["batch", "sequence"],
        **{f"past_key_values.{i}.{kind}": ["batch", 2, "past", 16] for i in layers for kind in kinds},
    }
    assert signature(model.graph.output) == {
        "logits": ["batch", "sequence", VOCAB],
        **{f"present.{i}.{kind}": ["batch", 2, "past + sequence", 16] for i in layers for kind in kinds},
    }
    assert {p.key: p.value for p in model.metadata_props} == {"mla_pass.max_position": "256"}


def test_names_follow_the_checkpoint_and_tell_no_path() -> None:
    folder = exported("llama_tied")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    names = {initializer.name for initializer in model.graph.initializer}
    assert {"model.embed_tokens.weight", "lm_head.weight"} & names
    scopes = [p.value for n in model.graph.node for p in n.metadata_props if p.key == "pkg.torch.onnx.name_scopes"]
    assert any("'model.layers.1.self_attn'" in scope for scope in scopes)
    assert b"site-packages" not in (folder / "model.onnx").read_bytes()


def test_tied_weights_are_written_once() -> None:
    model = FAMILIES["llama_tied"]()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    size = (exported("llama_tied") / "model.onnx.data").stat().st_size
    assert size < weights + model.lm_head.weight.nbytes / 2


# ---- folders


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved llama with a tokenizer and a generation config of its own."""
    from tokenizers import Tokenizer, models

    folder = tmp_path_factory.mktemp("checkpoint") / "tiny-llama"
    model = FAMILIES["llama"]()
    model.generation_config.temperature = 0.5
    model.generation_config.do_sample = True
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    return folder


def copied(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def test_folder_export_carries_its_files_moves_and_says_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deeper" / "out"
    assert export_hf(str(checkpoint), str(out)) == out
    assert capfd.readouterr() == ("", "")

    carried = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in out.iterdir()} == carried | {"model.onnx", "model.onnx.data"}
    for name in carried:
        assert (out / name).read_bytes() == (checkpoint / name).read_bytes()
    assert [entry.name for entry in out.parent.iterdir()] == ["out"]

    moved = out.rename(tmp_path / "moved")
    (tmp_path / "link").symlink_to(moved)
    monkeypatch.chdir("/")
    feeds, expected, seen = oracle(FAMILIES["llama"](), 2, 6, 0)
    assert_equal(session(tmp_path / "link").run(None, feeds), expected, seen, "float32")


def test_tokenizer_can_be_left_behind(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "_trace", lambda model, opset: None)
    monkeypatch.setattr(hf, "_save", lambda graph, path: None)
    monkeypatch.setattr(hf, "_verify", lambda model, path, dtype: None)
    export_hf(checkpoint, tmp_path / "out", tokenizer=False)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"config.json", "generation_config.json"}


def test_model_in_memory_is_left_as_it_is(tmp_path: Path) -> None:
    model = FAMILIES["llama"]().train()
    model.config.attn_logit_softcapping = 5.0
    assert model.config._attn_implementation == "sdpa"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prepared = hf.prepared(model, "float16")
    assert not prepared.training and prepared.config._attn_implementation == "eager"
    assert model.training and model.config._attn_implementation == "sdpa"
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ---- bad input: one sentence, nothing left


def refused(source: Any, out: Path, match: str, **options: Any) -> None:
    beside = sorted(out.parent.iterdir()) if out.parent.is_dir() else None
    with pytest.raises(MlaPassError, match=match) as caught:
        export_hf(source, out, **options)
    assert "\n" not in str(caught.value)
    assert (sorted(out.parent.iterdir()) if out.parent.is_dir() else None) == beside


def test_missing_folder(tmp_path: Path) -> None:
    refused(tmp_path / "absent", tmp_path / "out", "there is no folder")


def test_unreachable_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("nobody/no-such-model", tmp_path / "out", "no hub gave a model of that id")


def test_file_instead_of_folder(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    refused(tmp_path / "model.gguf", tmp_path / "out", r"is a file.*mla_pass\.export\.gguf")


def test_folder_without_config(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path / "out", "holds no config.json")


@pytest.mark.parametrize("text", ['{"model_type": "lla', '{"model_type": "no_such_kind"}', "{}"])
def test_unreadable_config(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text(text)
    refused(tmp_path / "bad", tmp_path / "out", "config.json cannot be read")


def test_not_a_causal_lm(tmp_path: Path) -> None:
    config = transformers.BertConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                     intermediate_size=16)  # fmt: skip
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    refused(tmp_path / "bert", tmp_path / "out", "not a causal language model: it is a BertModel")
    refused(torch.nn.Linear(2, 2), tmp_path / "out", "Linear is not a causal language model")


def test_weights_missing(checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = copied(checkpoint, tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.self_attn.k_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, tmp_path / "out", r"lack 1 tensors .*model\.layers\.1\.self_attn\.k_proj\.weight")


def test_weights_truncated_or_absent(checkpoint: Path, tmp_path: Path) -> None:
    folder = copied(checkpoint, tmp_path)
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    refused(folder, tmp_path / "out", "cannot be loaded")
    weights.unlink()
    refused(folder, tmp_path / "out", "cannot be loaded")


def test_weights_of_another_shape(checkpoint: Path, tmp_path: Path) -> None:
    folder = copied(checkpoint, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 1}))
    refused(folder, tmp_path / "out", "cannot be loaded")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"opset": 17}, "opset 17 is not offered: choose one of 18, 23, 24"),
        ({"dtype": "int4"}, "dtype 'int4' is not offered: choose one of float32, float16, bfloat16"),
    ],
)
def test_unsupported_option(tmp_path: Path, options: dict[str, Any], match: str) -> None:
    refused(FAMILIES["llama"](), tmp_path / "out", match, **options)


def test_rope_that_changes_with_length(tmp_path: Path) -> None:
    model = FAMILIES["llama"]()
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    refused(model, tmp_path / "out", "'dynamic' change with the length of the text")


@pytest.mark.parametrize("package", ["torch", "transformers", "onnxscript"])
def test_missing_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    refused("model", tmp_path / "out", rf'needs {package}: pip install "mla-pass\[torch\]"')


def test_missing_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    refused("model", tmp_path / "out", r'needs onnxruntime: pip install "mla-pass\[cpu\]"')


def test_taken_output(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept.txt").write_text("mine")
    refused("model", tmp_path / "full", "already holds files")
    assert (tmp_path / "full" / "kept.txt").read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    refused("model", tmp_path / "file", "exists and is not a folder")


def test_output_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    refused("model", tmp_path / "file" / "out", "cannot write the output folder .* is a file")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    refused("model", tmp_path / "out", "no permission to write")


@pytest.fixture(scope="module")
def traced() -> Any:
    return hf._trace(hf.prepared(FAMILIES["llama"](), "float32"), 18)


def test_disk_that_fills_up(tmp_path: Path, traced: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "_trace", lambda model, opset: traced)
    with file_size_limit(50_000):
        refused(FAMILIES["llama"](), tmp_path / "out", "cannot write the output folder")


@pytest.mark.parametrize("factor", [1.001, np.nan])
def test_export_that_differs_from_torch(
    tmp_path: Path, traced: Any, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    """The check after the export sees one norm of the written file that is a thousandth off, or not a number."""
    import onnx_ir as ir

    save = hf._save

    def save_damaged(graph: Any, path: Path) -> None:
        name, value = next((k, v) for k, v in graph.graph.initializers.items() if v.shape == [64])
        right = value.const_value
        value.const_value = ir.Tensor((right.numpy() * factor).astype(np.float32), name=name)
        save(graph, path)
        value.const_value = right

    monkeypatch.setattr(hf, "_trace", lambda model, opset: traced)
    monkeypatch.setattr(hf, "_save", save_damaged)
    refused(FAMILIES["llama"](), tmp_path / "out", "differs from torch")
