"""Converted checkpoints in transformers, against the converted graph in ONNX Runtime and the original model."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mla_pass
from mla_pass.errors import MlaPassError
from mla_pass.pytorch import operator
from tests.checkpoints import converted, load, padded, source, text
from tests.test_latent_cache import EVERY, expected, greedy, stepwise


@pytest.mark.parametrize("family", EVERY)
def test_padded_batch_equals_the_converted_graph(family: str) -> None:
    made, (ids, mask, positions) = converted(family), padded()
    model = made.model()
    seen, right = mask.bool().numpy(), expected(made, ids, mask)
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, position_ids=positions).logits
    for logits in (whole, stepwise(model, model.latent_cache(), ids, mask, positions, prompt=9)):
        np.testing.assert_allclose(logits.numpy()[seen], right[seen], atol=2e-5 * np.abs(right).max())


@pytest.mark.parametrize("family", ["qwen3", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_at_full_size_nothing_changes(family: str) -> None:
    made, (ids, mask, positions) = converted(family, 1.0), padded()
    with torch.no_grad():
        right, found = (
            model(ids, attention_mask=mask, position_ids=positions).logits for model in (made.original(), made.model())
        )
    seen = mask.bool()
    torch.testing.assert_close(found[seen], right[seen], rtol=0, atol=2e-5 * float(right.abs().max()))


MODES = [{"rope_mode": "extend"}, {"rope_mode": "repeat", "budget": 0.8}, {"absorb": "always"}]


@pytest.mark.parametrize("options", MODES)
def test_other_modes_equal_the_converted_graph(options: dict[str, Any]) -> None:
    options = dict(options)
    made, (ids, mask, positions) = converted("llama", options.pop("budget", 0.6), **options), padded()
    model = made.model()
    logits = stepwise(model, None or model.latent_cache(40), ids, mask, positions, prompt=9)
    seen, right = mask.bool().numpy(), expected(made, ids, mask)
    np.testing.assert_allclose(logits.numpy()[seen], right[seen], atol=2e-5 * np.abs(right).max())


def test_generate_with_caches_of_its_own_static_ones_and_transformers_own() -> None:
    from transformers import DynamicCache, StaticCache

    made = converted("gemma3")
    model = made.model()
    right = greedy(made, model, None)
    assert right == greedy(made, model, None, cache_implementation="static")
    assert right == greedy(made, model, DynamicCache(config=model.config))
    assert right == greedy(made, model, StaticCache(model.config, max_cache_len=64))
    assert right == greedy(made, model, model.latent_cache(64))


def test_without_use_cache_nothing_else_changes() -> None:
    made, (ids, _, _) = converted("llama"), padded(1)
    model = made.model()
    with torch.no_grad():
        torch.testing.assert_close(model(ids, use_cache=False).logits, model(ids).logits)


def test_the_torch_operators_equal_the_kernel(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the op library is not built, or off the CPU, torch's own operators compute the same, and it is said."""
    operator._say_that_it_is_slow.cache_clear()
    made, (ids, mask, positions) = converted("llama"), padded()
    model = made.model()
    monkeypatch.setattr("mla_pass.native.find_library", lambda: None)
    logits = stepwise(model, model.latent_cache(40), ids, mask, positions, prompt=9)
    assert caplog.text.count("the op library is not built") == 1
    seen, right = mask.bool().numpy(), expected(made, ids, mask)
    np.testing.assert_allclose(logits.numpy()[seen], right[seen], atol=2e-5 * np.abs(right).max())


@pytest.mark.parametrize("family", ["llama", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_a_checkpoint_goes_on_to_onnx(family: str, tmp_path: Path) -> None:
    """As stock operators with a growing cache of rows: the same numbers as the converted graph's, padding or not."""
    from mla_pass.export.hf import export_hf

    made, (ids, mask, _) = converted(family), padded()
    exported = mla_pass.session(export_hf(made.checkpoint, tmp_path / "onnx"))
    seen, right = mask.bool().numpy(), expected(made, ids, mask)
    found = exported.logits(ids.numpy(), mask.numpy())
    np.testing.assert_allclose(found[seen], right[seen], atol=2e-5 * np.abs(right).max())
    assert exported.bytes_per_token == mla_pass.session(made.onnx).bytes_per_token


def test_save_pretrained_folders_load_again(tmp_path: Path) -> None:
    made, (ids, _, _) = converted("mixtral"), padded(1)
    model = made.model()
    model.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "again")(ids).logits, model(ids).logits)
    told = json.loads((tmp_path / "again" / "config.json").read_text())
    assert told["model_type"] == "mla_pass" and told["mla"]["family"] == "mixtral"


def test_weights_of_attention_are_replaced_and_the_others_copied() -> None:
    made = converted("llama")
    before, after = (dict(model.named_parameters()) for model in (made.original(), made.model()))
    assert not any("k_proj" in name or "v_proj" in name for name in after)
    for name in before.keys() & after.keys():
        torch.testing.assert_close(before[name], after[name], rtol=0, atol=0)
    assert sum("self_attn" not in name for name in before) == sum("self_attn" not in name for name in after)


@pytest.mark.slow
def test_plain_transformers_refuses_the_folder_or_trusts_its_code() -> None:
    """A process that never heard of the format: refused, or read through the folder's own two lines."""
    folder = converted("llama").checkpoint
    program = f"""
from transformers import AutoModelForCausalLM
import sys
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code={{trust}})
print(type(model).__name__)
"""
    refused, trusted = (
        subprocess.run([sys.executable, "-c", program.format(trust=trust)], capture_output=True, text=True, check=False)
        for trust in (False, True)
    )
    assert refused.returncode != 0 and "trust_remote_code" in refused.stderr
    assert trusted.stdout.split() == ["LatentLlamaForCausalLM"], trusted.stderr


# ---- bad input


def test_a_cache_that_holds_keys_is_refused() -> None:
    from transformers import DynamicCache

    made, (ids, _, _) = converted("llama"), padded(1)
    cache = DynamicCache()
    with torch.no_grad():
        made.original()(ids, past_key_values=cache)
        with pytest.raises(MlaPassError, match="holds keys and values; give an empty one"):
            made.model()(ids, past_key_values=cache)


def test_training_mode_is_refused() -> None:
    made, (ids, _, _) = converted("llama"), padded(1)
    with pytest.raises(MlaPassError, match="in training mode; call model.eval"):
        made.model().train()(ids)


def test_gradients_are_refused() -> None:
    made, (ids, _, _) = converted("llama"), padded(1)
    with pytest.raises(RuntimeError, match="autograd"):
        made.model()(ids).logits.sum().backward()


def test_folders_of_another_version_are_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(converted("llama").checkpoint, tmp_path / "old")
    told = json.loads((folder / "config.json").read_text())
    told["mla"]["format_version"] = 0
    (folder / "config.json").write_text(json.dumps(told))
    with pytest.raises(MlaPassError, match="format version 0; this mla_pass reads 1"):
        load(folder)
    del told["mla"]
    (folder / "config.json").write_text(json.dumps(told))
    with pytest.raises(MlaPassError, match="lacks the 'mla' entry"):
        load(folder)


def test_sources_that_cannot_be_converted_are_refused(tmp_path: Path) -> None:
    from mla_pass.pytorch.convert import convert_checkpoint

    with pytest.raises(MlaPassError, match="holds no config.json"):
        convert_checkpoint(tmp_path, calibrate=text())
    folder = shutil.copytree(source("llama"), tmp_path / "bare")
    (folder / "model.safetensors").unlink()
    with pytest.raises(MlaPassError, match="holds no model.safetensors"):
        convert_checkpoint(folder, calibrate=text())
    with pytest.raises(MlaPassError, match="dtype 'int4' is not offered"):
        convert_checkpoint(source("llama"), dtype="int4", calibrate=text())
    with pytest.raises(MlaPassError, match="converted whole or not at all"):
        convert_checkpoint(source("llama"), mla_pass.MlaConfig(partial=True), calibrate=text())


def test_a_budget_is_of_the_checkpoints_own_bytes() -> None:
    """Converted in float32 or not, the cache of a 16-bit model has 2 bytes a number, and so has that of its rows."""
    made = converted("llama", cache_dtype="int8", dtype="bfloat16")
    model, plain = load(made.checkpoint), load(made.source, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        found, right = (m(padded(1)[0], use_cache=True).past_key_values for m in (model, plain))
    after, before = (
        sum(x.untyped_storage().nbytes() for layer in cache.layers for x in (layer.keys, layer.values))
        for cache in (found, right)
    )
    assert 0.5 * before < after <= 0.6 * before
