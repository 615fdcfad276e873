"""LatentCache under an unmodified model: the converted ONNX model in ONNX Runtime tells what is right."""

from typing import Any

import numpy as np
import pytest
import torch

import mla_pass
from mla_pass.errors import MlaPassError
from mla_pass.pytorch.cache import LatentCache
from tests.checkpoints import Converted, converted, load, padded, source

FAMILIES = ("llama", "qwen2", "gemma3")
SLOW_FAMILIES = ("phi3_partial", "qwen3", "llama_yarn", "gemma2", "mistral", "mixtral", "gemma", "llama_mqa", "llama3")
EVERY = [*FAMILIES, *(pytest.param(family, marks=pytest.mark.slow) for family in SLOW_FAMILIES)]


def stepwise(model: Any, cache: Any, ids: Any, mask: Any, positions: Any, prompt: int) -> torch.Tensor:
    """Logits of a prompt and then token by token."""
    parts, ends = [], [prompt, *range(prompt + 1, ids.shape[1] + 1)]
    with torch.no_grad():
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            given = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
            parts.append(model(ids[:, start:end], past_key_values=cache, **given).logits)
    return torch.cat(parts, 1)


def expected(made: Converted, ids: Any, mask: Any) -> np.ndarray:
    return mla_pass.session(made.onnx, fused=False).logits(ids.numpy(), mask.numpy())


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("rows", [None, 40])
def test_padded_batch_step_by_step_equals_the_converted_graph(family: str, rows: int | None) -> None:
    made, (ids, mask, positions) = converted(family), padded()
    model = made.original()
    cache = LatentCache.from_pretrained(made.checkpoint, model=model, max_cache_len=rows)
    logits = stepwise(model, cache, ids, mask, positions, prompt=9)
    seen = mask.bool().numpy()
    right = expected(made, ids, mask)
    np.testing.assert_allclose(logits.numpy()[seen], right[seen], atol=2e-5 * np.abs(right).max())
    assert cache.get_seq_length() == ids.shape[1]


@pytest.mark.parametrize("family", ["qwen3", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_at_full_size_nothing_changes(family: str) -> None:
    made, (ids, mask, positions) = converted(family, 1.0), padded()
    model = made.original()
    with torch.no_grad():
        right = model(ids, attention_mask=mask, position_ids=positions).logits
    logits = stepwise(model, LatentCache.from_pretrained(made.checkpoint, model=model), ids, mask, positions, prompt=9)
    seen = mask.bool()
    torch.testing.assert_close(logits[seen], right[seen], rtol=0, atol=2e-5 * float(right.abs().max()))


def greedy(made: Converted, model: Any, cache: Any, **options: Any) -> list[list[int]]:
    ids, mask, _ = padded()
    told = {"attention_mask": mask, "max_new_tokens": 24, "do_sample": False, "max_length": None, **options}
    return model.generate(ids, past_key_values=cache, **told)[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("rows", [None, 64])
def test_generates_what_the_converted_graph_generates(rows: int | None) -> None:
    made, (ids, mask, _) = converted("llama"), padded()
    prompts = [row[keep].tolist() for row, keep in zip(ids, mask.bool(), strict=True)]
    right = mla_pass.session(made.onnx, fused=False)
    from mla_pass.onnx.generate import GenerateConfig, generate

    model = made.original()
    model.generation_config.eos_token_id = None
    found = greedy(made, model, LatentCache.from_pretrained(made.checkpoint, model=model, max_cache_len=rows))
    # pads to the longest prompt as the batch here does, so that blocks of rows fall alike
    done = generate(right, prompts, GenerateConfig(max_new_tokens=24, stop_at_eos=False))
    assert [tuple(row) for row in found] == list(done.token_ids)


def test_beams_are_reordered() -> None:
    """Beams that swap places must take their rows along: the converted model, whose rows are its own, agrees."""
    made = converted("llama")
    model, other = made.original(), made.model()
    found = greedy(made, model, LatentCache.from_pretrained(made.checkpoint, model=model), num_beams=3)
    assert found == greedy(made, other, None, num_beams=3)
    assert found != greedy(made, other, None)


def test_cropped_rows_are_forgotten() -> None:
    made, (ids, _, _) = converted("llama"), padded(1)
    model = made.original()
    for rows in (None, 64):
        cache = LatentCache.from_pretrained(made.checkpoint, model=model, max_cache_len=rows)
        with torch.no_grad():
            right = model(ids, past_key_values=cache).logits[:, -4:]
            cache.crop(-4)
            assert cache.get_seq_length() == ids.shape[1] - 4
            again = model(ids[:, -4:], past_key_values=cache).logits
        torch.testing.assert_close(again, right, rtol=0, atol=1e-5)


def test_reset_forgets_everything() -> None:
    made, (ids, _, _) = converted("llama"), padded(1)
    model = made.original()
    for rows in (None, 64):
        cache = LatentCache.from_pretrained(made.checkpoint, model=model, max_cache_len=rows)
        with torch.no_grad():
            right = model(ids, past_key_values=cache).logits
            cache.reset()
            assert cache.get_seq_length() == 0
            torch.testing.assert_close(model(ids, past_key_values=cache).logits, right, rtol=0, atol=1e-6)


def test_bytes_are_those_of_the_rows() -> None:
    """0.6 of the original's, read off the storage of live tensors: latents and rotated parts, nothing else."""
    from transformers import DynamicCache

    made, (ids, _, _) = converted("llama"), padded(1)
    model, plain = made.original(), DynamicCache()
    cache = LatentCache.from_pretrained(made.checkpoint, model=model)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        model(ids, past_key_values=plain)
    before = sum(x.untyped_storage().nbytes() for layer in plain.layers for x in (layer.keys, layer.values))
    after = sum(x.untyped_storage().nbytes() for layer in cache.layers for x in (layer.keys, layer.values))
    assert cache.bytes() == after
    assert 0.5 * before < after <= 0.6 * before


def test_layers_go_to_the_cpu_and_back_and_sequences_are_picked() -> None:
    """What transformers does to a layer when it offloads, or generates several answers to one prompt."""
    made, (ids, mask, positions) = converted("llama"), padded()
    model = made.original()
    cache = LatentCache.from_pretrained(made.checkpoint, model=model)
    with torch.no_grad():
        model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    layer = cache.layers[0]
    before = layer.keys.clone(), layer.values.clone()
    layer.offload()
    layer.prefetch()
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([1, 5]))
    for now, then in zip((layer.keys, layer.values), before, strict=True):
        assert torch.equal(now, then[[0, 2]])
    with pytest.raises(MlaPassError, match="torch finds none here"):
        LatentCache.from_pretrained(made.checkpoint, offloading=True)


def test_eight_bit_rows() -> None:
    made, (ids, mask, positions) = converted("llama", cache_dtype="int8"), padded()
    model = made.original()
    cache = LatentCache.from_pretrained(made.checkpoint, model=model)
    logits = stepwise(model, cache, ids, mask, positions, prompt=9)
    seen, right = mask.bool().numpy(), expected(made, ids, mask)
    # A number that lies half way may be rounded either way: a step is 1/116 of a segment's largest.
    np.testing.assert_allclose(logits.numpy()[seen], right[seen], atol=2e-2 * np.abs(right).max())
    assert cache.layers[0].keys.dtype == torch.int8


def test_half_precision() -> None:
    made, (ids, mask, positions) = converted("llama"), padded()
    model = load(made.source, dtype=torch.bfloat16)
    cache = LatentCache.from_pretrained(made.checkpoint, model=model)
    logits = stepwise(model, cache, ids, mask, positions, prompt=9).float()
    seen, right = mask.bool().numpy(), expected(made, ids, mask)
    np.testing.assert_allclose(logits.numpy()[seen], right[seen], atol=6e-2 * np.abs(right).max())


# ---- bad input


def test_another_model_is_refused() -> None:
    made, (ids, _, _) = converted("llama"), padded(1)
    with pytest.raises(MlaPassError, match="2 layers, the model 4"):
        LatentCache.from_pretrained(made.checkpoint, model=load(source("gemma3")))
    with pytest.raises(MlaPassError, match="rotary frequencies are not this model's"):
        LatentCache.from_pretrained(made.checkpoint, model=load(source("llama_yarn")))
    from tests.families import FAMILIES as every

    with torch.no_grad(), pytest.raises(MlaPassError, match="2 key/value heads of 16 and 16 numbers, .* has 1 of"):
        every["llama_mqa"]()(ids, past_key_values=LatentCache.from_pretrained(made.checkpoint))
    with torch.no_grad(), pytest.raises(MlaPassError, match="this cache has 2 layers, the model more"):
        every["gemma2"]()(ids, past_key_values=LatentCache.from_pretrained(made.checkpoint))


def test_a_batch_that_is_not_heard_is_refused() -> None:
    made, (ids, _, _) = converted("llama"), padded()
    with torch.no_grad(), pytest.raises(MlaPassError, match="make the cache with LatentCache.from_pretrained"):
        made.original()(ids, past_key_values=LatentCache.from_pretrained(made.checkpoint))


def test_training_mode_is_refused() -> None:
    made, (ids, _, _) = converted("llama"), padded(1)
    model = made.original()
    cache = LatentCache.from_pretrained(made.checkpoint, model=model)
    with pytest.raises(MlaPassError, match="in training mode; call model.eval"):
        model.train()(ids, past_key_values=cache)


def test_a_full_buffer_is_refused() -> None:
    made, (ids, _, _) = converted("llama"), padded(1)
    model = made.original()
    cache = LatentCache.from_pretrained(made.checkpoint, model=model, max_cache_len=12)
    with torch.no_grad(), pytest.raises(MlaPassError, match="20 rows.*12"):
        model(ids, past_key_values=cache)
    assert cache.get_seq_length() == 0  # nothing of it counts
    with pytest.raises(MlaPassError, match="max_cache_len must lie in 1..256"):
        LatentCache.from_pretrained(made.checkpoint, max_cache_len=257)


def test_folders_that_hold_no_conversion_are_refused(tmp_path: Any) -> None:
    with pytest.raises(MlaPassError, match="holds no converted checkpoint"):
        LatentCache.from_pretrained(source("llama"))
    with pytest.raises(MlaPassError, match="config.json cannot be read"):
        LatentCache.from_pretrained(tmp_path)


def test_a_conversion_that_leaves_pairs_still_is_refused() -> None:
    made = converted("llama", rope_mode="extend")
    with pytest.raises(MlaPassError, match="leaves numbers of a key un-rotated, .* load the folder as a model"):
        LatentCache.from_pretrained(made.checkpoint)
