"""torch.compile with our backend: the same numbers as eager, one graph, no compiling per token."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from mla_pass.pytorch import operator as ops
from mla_pass.pytorch.backend import mla_pass as backend
from mla_pass.pytorch.cache import LatentCache
from tests.checkpoints import Converted, converted, padded

PROMPT, STEPS = 21, 8
"""So that no length on the way is a size of the model: a compiler would take the two for one."""


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(model: Any, inner: Any = "eager") -> Any:
    return torch.compile(model, backend=backend, fullgraph=True, options={"backend": inner})


def decode(model: Any, step: Any, cache: Any, rows: int = 3) -> torch.Tensor:
    """Logits of STEPS tokens behind a prompt that `model` reads; a mask of changing length is among the inputs."""
    ids, mask, positions = padded(rows, length=PROMPT + STEPS)
    masks = [mask[:, :end].clone() for end in range(PROMPT + STEPS + 1)]  # a slice of a row is laid out otherwise
    with torch.no_grad():
        model(ids[:, :PROMPT], attention_mask=masks[PROMPT], position_ids=positions[:, :PROMPT], past_key_values=cache)
        return torch.cat([
            step(
                ids[:, i : i + 1], attention_mask=masks[i + 1], position_ids=positions[:, i : i + 1],
                past_key_values=cache,
            ).logits
            for i in range(PROMPT, PROMPT + STEPS)
        ], 1)  # fmt: skip


def cache_of(made: Converted, model: Any, rows: int | None) -> LatentCache:
    return LatentCache.from_pretrained(made.checkpoint, model=model, max_cache_len=rows)


@pytest.mark.parametrize("rows", [None, 50])
@pytest.mark.parametrize(
    "family", ["llama", "gemma3", *(pytest.param(f, marks=pytest.mark.slow) for f in ("phi3_partial", "qwen3"))]
)
def test_fused_steps_equal_eager_ones(family: str, rows: int | None) -> None:
    made = converted(family)
    model = made.original()
    right = decode(model, model, cache_of(made, model, rows))
    seen: list[Any] = []

    def inner(graph: Any, inputs: Any, **_: Any) -> Any:
        seen.append([node.target for node in graph.graph.nodes])
        return graph.forward

    found = decode(model, compiled(model, inner), cache_of(made, model, rows))
    torch.testing.assert_close(found, right, rtol=0, atol=2e-5 * float(right.abs().max()))
    assert len(seen) == 2  # the mask is longer with every token: once as it is, once for any length
    for targets in seen:
        assert ops.latent_update._opoverload not in targets
        assert torch.nn.functional.scaled_dot_product_attention not in targets


@pytest.mark.parametrize(("rows", "graphs"), [(50, 1), (None, 2)])
def test_no_compiling_per_token(rows: int | None, graphs: int) -> None:
    made = converted("llama")
    model = made.original()
    step, ids = compiled(model), padded(1, length=PROMPT + STEPS)[0]
    cache = cache_of(made, model, rows)
    with torch.no_grad():
        model(ids[:, :PROMPT], past_key_values=cache)
        for i in range(PROMPT, PROMPT + STEPS):
            step(ids[:, i : i + 1], past_key_values=cache)
    assert counters["stats"]["unique_graphs"] == graphs


def test_a_prompt_is_compiled_as_well() -> None:
    made, (ids, mask, positions) = converted("llama"), padded()
    model = made.original()
    given = {"attention_mask": mask, "position_ids": positions}
    with torch.no_grad():
        right = model(ids, past_key_values=cache_of(made, model, 50), **given).logits
        cache = cache_of(made, model, 50)
        model(ids[:, :1], past_key_values=cache)  # buffers are made where nothing is traced
        cache.reset()
        found = compiled(model)(ids, past_key_values=cache, **given).logits
    torch.testing.assert_close(found[mask.bool()], right[mask.bool()], rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [None, 50])
def test_inductor_compiles_the_rest(rows: int | None) -> None:
    made = converted("llama")
    model = made.original()
    right = decode(model, model, cache_of(made, model, rows))
    found = decode(model, compiled(model, "inductor"), cache_of(made, model, rows))
    torch.testing.assert_close(found, right, rtol=0, atol=2e-5 * float(right.abs().max()))


def test_a_converted_model_needs_no_rewriting(caplog: pytest.LogCaptureFixture) -> None:
    made = converted("gemma3")
    model = made.model()
    right = decode(model, model, model.latent_cache(50))
    with caplog.at_level(logging.WARNING):
        found = decode(model, compiled(model), model.latent_cache(50))
    torch.testing.assert_close(found, right, rtol=0, atol=2e-5 * float(right.abs().max()))
    assert not [record for record in caplog.records if record.name.startswith("mla_pass")]


def test_without_a_latent_cache_it_says_so(caplog: pytest.LogCaptureFixture) -> None:
    from transformers import StaticCache

    model = converted("llama").original()
    right = decode(model, model, StaticCache(model.config, max_cache_len=50))
    with caplog.at_level(logging.WARNING):
        found = decode(model, compiled(model), StaticCache(model.config, max_cache_len=50))
    torch.testing.assert_close(found, right, rtol=0, atol=1e-4)
    assert "nothing to shrink: this graph has no LatentCache" in caplog.text


def test_weights_that_change_are_seen() -> None:
    """They are inputs of the graph: a model that is loaded anew is not answered with old numbers."""
    made = converted("llama")
    model = made.original()
    step = compiled(model)
    decode(model, step, cache_of(made, model, 50))
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(0.5)
    right = decode(model, model, cache_of(made, model, 50))
    torch.testing.assert_close(decode(model, step, cache_of(made, model, 50)), right, rtol=0, atol=1e-4)


def test_attention_that_is_not_known_is_refused() -> None:
    made = converted("llama")
    model = made.original()
    model.set_attn_implementation("eager")
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="expected scaled_dot_product_attention alone"):
        decode(model, compiled(model), cache_of(made, model, 50))


@pytest.mark.parametrize(("told", "other"), [('"scale":0.25', '"scale":0.5'), ('"softcap":0.0', '"softcap":5.0')])
def test_scores_that_are_scaled_otherwise_are_refused(told: str, other: str) -> None:
    made = converted("llama")
    model = made.original()
    cache = cache_of(made, model, 50)
    for layer in cache.layers:
        assert told in layer.attributes
        layer.attributes = layer.attributes.replace(told, other)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="scales its scores by 0.25 without a cap"):
        decode(model, compiled(model), cache)


def test_torch_knows_it_by_name() -> None:
    assert torch._dynamo.lookup_backend("mla_pass") is backend


def test_gradients_are_refused() -> None:
    made, (ids, _, _) = converted("llama"), padded(1)
    model = made.original()
    cache = cache_of(made, model, 50)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="under torch.no_grad"):
        compiled(model)(ids[:, :1], past_key_values=cache)


def test_a_backend_that_torch_does_not_know_is_refused() -> None:
    model, (ids, _, _) = converted("llama").original(), padded(1)
    with torch.no_grad(), pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="knows no such backend"):
        compiled(model, "indoctor")(ids)
