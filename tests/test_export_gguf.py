"""GGUF files written here from tiny torch models, read back, and run against the model they came from."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mla_pass.errors import MlaPassError
from tests.families import FAMILIES
from tests.limits import file_size_limit

gguf = pytest.importorskip("gguf")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from mla_pass.export.gguf import gguf_to_hf, main  # noqa: E402

TOKENS = ["<pad>", "<s>", "</s>", *map(chr, range(ord("!"), ord("~"))), "ab"]
KINDS = [3, 3, 3] + [1] * (len(TOKENS) - 3)  # control, then normal
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "model.embed_tokens": "token_embd", "model.norm": "output_norm",
    "lm_head": "output",
}  # fmt: skip

Change = Callable[[dict[str, Any], dict[str, np.ndarray]], None]


def gguf_name(name: str) -> str:
    module, suffix = name.rsplit(".", 1)
    if module.startswith("model.layers."):
        _, _, layer, inner = module.split(".", 3)
        return f"blk.{layer}.{NAMES[inner]}.{suffix}"
    return f"{NAMES[module]}.{suffix}"


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows in llama.cpp's order: row i of a head goes to 2i, row i + d/2 to 2i + 1."""
    size = weight.shape[0] // heads
    rows = [h * size + i + part * size // 2 for h in range(heads) for i in range(size // 2) for part in (0, 1)]
    return weight[rows]


def write(
    path: Path,
    model: Any,
    architecture: str,
    *,
    interleaved: bool,
    quantised: bool = False,
    change: Change | None = None,
) -> Path:
    config = model.config
    metadata: dict[str, Any] = {
        "context_length": 256, "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers, "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads, "attention.key_length": 16, "rope.freq_base": 500.0,
        "attention.layer_norm_rms_epsilon": 1e-5,
    }  # fmt: skip
    metadata = {f"{architecture}.{key}": value for key, value in metadata.items()}
    tokenizer = {"model": "gpt2", "pre": "smollm", "tokens": TOKENS, "token_type": KINDS, "merges": ["a b"],
                 "bos_token_id": 1, "eos_token_id": 2, "padding_token_id": 0}  # fmt: skip
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in tokenizer.items()}
    tensors = {}
    for name, parameter in model.named_parameters():
        weight = parameter.detach().numpy()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if interleaved and part in name:
                weight = interleave(weight, heads)
        tensors[gguf_name(name)] = weight
    if change:
        change(metadata, tensors)
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}[
            type(value)
        ](key, value)
    for name, weight in tensors.items():
        kind = gguf.GGMLQuantizationType.Q8_0 if quantised and weight.ndim == 2 else None
        writer.add_tensor(name, gguf.quantize(weight, kind) if kind else weight, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def model_of(family: str) -> Any:
    """A family's model with the rotary base and epsilon that `write` names."""
    model = FAMILIES[family]()
    config = model.config
    config.rope_parameters = {"rope_type": "default", "rope_theta": 500.0}
    config.rms_norm_eps = float(np.float32(1e-5))
    same = type(model)(config).eval()
    same.load_state_dict(model.state_dict())
    return same


def logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.arange(3, 60).reshape(3, 19)).logits.numpy()


CASES = [("llama", "llama", True), ("llama_mha", "llama", True), ("qwen2", "qwen2", False), ("qwen3", "qwen3", False)]


@pytest.mark.parametrize(("family", "architecture", "interleaved"), CASES)
def test_model_comes_back(tmp_path: Path, family: str, architecture: str, interleaved: bool) -> None:
    model = model_of(family)
    source = write(tmp_path / "model.gguf", model, architecture, interleaved=interleaved)
    folder = gguf_to_hf(source, tmp_path / "out")
    assert folder == tmp_path / "out"
    found = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(found) is type(model)
    expected = model.state_dict()
    assert found.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())
    np.testing.assert_array_equal(logits(found), logits(model))
    assert found.generation_config.eos_token_id == 2
    assert found.config.max_position_embeddings == 256


def test_tied_embeddings(tmp_path: Path) -> None:
    model = FAMILIES["llama_tied"]()
    source = write(tmp_path / "model.gguf", model, "llama", interleaved=True)
    found = transformers.AutoModelForCausalLM.from_pretrained(gguf_to_hf(source, tmp_path / "out"))
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert torch.equal(found.lm_head.weight, model.lm_head.weight)


def test_quantised_weights_are_dequantised(tmp_path: Path) -> None:
    model = model_of("llama")
    source = write(tmp_path / "model.gguf", model, "llama", interleaved=True, quantised=True)
    found = transformers.AutoModelForCausalLM.from_pretrained(gguf_to_hf(source, tmp_path / "out")).state_dict()
    for name, weight in model.state_dict().items():
        if weight.ndim == 1:
            assert torch.equal(found[name], weight)
            continue
        blocks = weight.reshape(-1, 32)  # one half-precision scale a block, 127 steps to its largest value
        error = (found[name].reshape(-1, 32) - blocks).abs().amax(1)
        assert (error <= blocks.abs().amax(1) * (0.5 / 127 + 2.0**-10)).all()
        assert error.max() > 0


def test_rope_scaling(tmp_path: Path) -> None:
    def yarn(metadata: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        metadata |= {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0,
                     "llama.rope.scaling.original_context_length": 64}  # fmt: skip

    source = write(tmp_path / "model.gguf", FAMILIES["llama"](), "llama", interleaved=True, change=yarn)
    rope = transformers.AutoConfig.from_pretrained(gguf_to_hf(source, tmp_path / "out")).rope_parameters
    expected = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 64}
    assert {key: rope[key] for key in expected} == expected


def test_tokenizer_comes_along(tmp_path: Path) -> None:
    source = write(tmp_path / "model.gguf", FAMILIES["llama"](), "llama", interleaved=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf_to_hf(source, tmp_path / "out"))
    ids = [TOKENS.index(token) for token in ("c", "ab", "s")]
    assert tokenizer.encode("cabs") == ids
    assert tokenizer.decode(ids) == "cabs"
    assert tokenizer.eos_token_id == 2


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "model.gguf", FAMILIES["llama"](), "llama", interleaved=True)
    assert main([str(source), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    assert main([str(source), str(tmp_path / "out")]) == 1
    assert "already holds files" in capsys.readouterr().err


# ---- bad input: one sentence, nothing left


def refused(source: Path, match: str) -> None:
    out = source.parent / "out"
    before = sorted(source.parent.iterdir())
    with pytest.raises(MlaPassError, match=match) as caught:
        gguf_to_hf(source, out)
    assert "\n" not in str(caught.value)
    assert sorted(source.parent.iterdir()) == before


def test_no_file_or_no_gguf(tmp_path: Path) -> None:
    refused(tmp_path / "absent.gguf", "is not a file")
    for content in (b"", b"PK\x03\x04 something else"):
        (tmp_path / "other.gguf").write_bytes(content)
        refused(tmp_path / "other.gguf", "is not a GGUF: it begins with")


@pytest.mark.parametrize("kept", [6, 20, 200, 2000, -100])
def test_truncated(tmp_path: Path, kept: int) -> None:
    """Cut in the version, the counts, the metadata, the tensor table and the last tensor."""
    source = write(tmp_path / "model.gguf", FAMILIES["llama"](), "llama", interleaved=True)
    os.truncate(source, kept if kept > 0 else source.stat().st_size + kept)
    refused(source, "is truncated or corrupt")


def test_unknown_architecture(tmp_path: Path) -> None:
    source = write(tmp_path / "model.gguf", FAMILIES["llama"](), "falcon", interleaved=False)
    refused(source, "holds the architecture 'falcon'; supported are llama, qwen2, qwen3")


CHANGES: list[tuple[str, Change]] = [
    ("lacks 1 tensors .*blk.1.attn_k.weight", lambda m, t: t.pop("blk.1.attn_k.weight")),
    (r"beyond what .* 1 tensors \(rope_freqs.weight\)", lambda m, t: t.update({"rope_freqs.weight": np.ones(8, "f4")})),
    ("blk.0.attn_k.weight has the shape", lambda m, t: t.update({"blk.0.attn_k.weight": np.ones((16, 64), "f4")})),
    ("lacks block_count", lambda m, t: m.pop("llama.block_count")),
    ("lacks token_embd.weight", lambda m, t: t.pop("token_embd.weight")),
    ("scales its rotary positions by 'longrope'", lambda m, t: m.update({"llama.rope.scaling.type": "longrope"})),
    ("one part of a split GGUF", lambda m, t: m.update({"split.count": 2})),
    ("cannot read the tokenizer", lambda m, t: [m.pop(k) for k in list(m) if k.startswith("tokenizer.")]),
    ("cannot read the tokenizer", lambda m, t: m.update({"tokenizer.ggml.merges": ["x y"]})),
    ("cannot read the tokenizer", lambda m, t: m.update({"tokenizer.ggml.model": "no-such-kind"})),
]


@pytest.mark.parametrize(("match", "change"), CHANGES)
def test_incomplete_or_foreign(tmp_path: Path, match: str, change: Change) -> None:
    refused(write(tmp_path / "model.gguf", FAMILIES["llama"](), "llama", interleaved=True, change=change), match)


def test_disk_that_fills_up(tmp_path: Path) -> None:
    source = write(tmp_path / "model.gguf", FAMILIES["llama"](), "llama", interleaved=True)
    with file_size_limit(50_000):
        refused(source, "cannot write the output folder")


@pytest.mark.parametrize("package", ["gguf", "torch", "transformers", "safetensors"])
def test_missing_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    refused(tmp_path / "model.gguf", rf'needs {package}: pip install "mla-pass\[torch\]"')
