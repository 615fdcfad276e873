"""Converted folders in onnxruntime-genai: the same tokens as from our own generator, token by token."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime_genai as og
import pytest

import mla_pass
from mla_pass import MlaConfig, MlaPassError
from mla_pass.onnx.session import Decoder
from tests.families import VOCAB, exported
from tests.native_cases import needs_library
from tests.test_convert import SMALL, ids_file

PROMPT = [3, 17, 40, 8, 25, 6]


def converted(folder: Path, family: str = "llama", *, bundle: bool = False, **config: object) -> Path:
    options = MlaConfig(**{**SMALL, "layout": "genai", "budget": 0.6, **config})
    result = mla_pass.convert(exported(family), options, calibrate=ids_file(folder))
    return result.save(folder / "model", bundle=bundle)


def greedy(folder: Path, prompts: np.ndarray, count: int) -> np.ndarray:
    """[B, prompt + count] by plain ONNX Runtime."""
    session = mla_pass.session(folder)
    decoder = Decoder(session, len(prompts), prompts.shape[1] + count)
    logits, text = decoder.prefill(prompts), prompts
    for _ in range(count):
        text = np.concatenate([text, logits.argmax(-1)[:, None]], axis=1)
        logits = decoder.step(text[:, -1])
    return text


def generator(folder: Path, batch: int = 1, length: int = 48):
    model = og.Model(str(folder))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=length, batch_size=batch)
    return og.Generator(model, parameters)


def by_genai(folder: Path, prompts: np.ndarray, count: int) -> np.ndarray:
    g = generator(folder, len(prompts))
    g.append_tokens(prompts.astype(np.int32))
    for _ in range(count):
        g.generate_next_token()
    return np.array([g.get_sequence(i) for i in range(len(prompts))])


def check_same(folder: Path, prompts: np.ndarray, count: int) -> None:
    want = greedy(folder, prompts, count)
    never_end(folder, want)
    np.testing.assert_array_equal(by_genai(folder, prompts, count), want)


def never_end(folder: Path, text: np.ndarray) -> None:
    """A random model may choose any token: let one be the end that `text` does not hold."""
    path = folder / "genai_config.json"
    config = json.loads(path.read_text())
    config["model"]["eos_token_id"] = min(set(range(VOCAB)) - set(text.ravel().tolist()))
    path.write_text(json.dumps(config))


@needs_library
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "mixtral"])
def test_same_tokens_as_our_generator(family: str, tmp_path: Path) -> None:
    check_same(converted(tmp_path, family, bundle=True), np.array([PROMPT, PROMPT[::-1]]), 30)


@pytest.mark.parametrize(
    "options",
    [
        {}, {"cache": "growing"}, {"rank": 14, "rope_dims": 4},
        {"cache_dtype": "float16"}, {"cache_dtype": "int8"}, {"cache_dtype": "float8"},
    ],
    ids=str,
)  # fmt: skip
def test_without_the_library(options: dict[str, object], tmp_path: Path) -> None:
    folder = converted(tmp_path, **options)
    assert "custom_ops_library" not in (folder / "genai_config.json").read_text()
    check_same(folder, np.array([PROMPT]), 20)


@needs_library
def test_rewind(tmp_path: Path) -> None:
    folder = converted(tmp_path, bundle=True)
    want = greedy(folder, np.array([[*PROMPT[:5], 30, 31]]), 10)
    first = greedy(folder, np.array([PROMPT]), 12)
    never_end(folder, np.concatenate([want, first], axis=1))
    g = generator(folder)
    g.append_tokens(PROMPT)
    for _ in range(12):
        g.generate_next_token()
    g.rewind_to(5)
    g.append_tokens([30, 31])
    for _ in range(10):
        g.generate_next_token()
    np.testing.assert_array_equal([g.get_sequence(0)], want)


def test_halves_lie_as_genai_wants_them(tmp_path: Path) -> None:
    folder = converted(tmp_path)
    cache = mla_pass.session(folder).cache
    for first, second in zip(cache.tensors[::2], cache.tensors[1::2], strict=True):
        assert (first.width, first.dtype, first.kind) == (second.width, second.dtype, second.kind)
    config = json.loads((folder / "genai_config.json").read_text())
    assert config["model"]["decoder"]["head_size"] == cache.tensors[0].width
    assert config["search"]["past_present_share_buffer"]
    plain = mla_pass.convert(exported("llama"), MlaConfig(**SMALL, budget=0.6), calibrate=ids_file(tmp_path))
    # The same row in other tensors: the same model.
    want = mla_pass.session(plain.save(tmp_path / "plain")).logits([PROMPT])
    np.testing.assert_allclose(mla_pass.session(folder).logits([PROMPT]), want, rtol=0, atol=2e-4 * np.abs(want).max())


# ---- what cannot be served


def test_what_config_json_does_not_tell(tmp_path: Path) -> None:
    model = Path(shutil.copytree(exported("llama"), tmp_path / "source"))
    config = json.loads((model / "config.json").read_text())
    options = MlaConfig(**SMALL, layout="genai")
    for change, message in (
        (json.dumps({**config, "hidden_size": None}), "names no hidden_size, which layout='genai' needs"),
        ("[]", "holds no JSON object"),
        ("{", "cannot be read"),
    ):
        (model / "config.json").write_text(change)
        with pytest.raises(MlaPassError, match=message):
            mla_pass.convert(model, options, calibrate=ids_file(tmp_path))
    (model / "config.json").unlink()
    with pytest.raises(MlaPassError, match="cannot be read .* put the checkpoint's own config.json beside the model"):
        mla_pass.convert(model, options, calibrate=ids_file(tmp_path))


def test_a_model_in_memory_has_no_folder(tmp_path: Path) -> None:
    import onnx_ir as ir

    model = ir.load(exported("llama") / "model.onnx")
    with pytest.raises(MlaPassError, match="a model in memory has no config.json"):
        mla_pass.convert(model, MlaConfig(**SMALL, layout="genai"), calibrate=np.load(ids_file(tmp_path)))
