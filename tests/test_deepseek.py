"""The stock deepseek_v3 checkpoint: exact where nothing is lost, else what its latents say, and small when it runs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm

from mla_pass import MlaConfig, MlaPassError
from mla_pass.calibrate import calibrate
from mla_pass.export.hf import export_hf
from mla_pass.fold import LatentWeights
from mla_pass.fold.ladder import Ladder, best_ladder, ladders, on_ladder, saved_losses
from mla_pass.onnx.instrument import instrument
from mla_pass.onnx.io import load_model
from mla_pass.patterns import find_sites
from mla_pass.pytorch.deepseek import DeepseekReport, save_deepseek
from mla_pass.pytorch.deepseek_fold import folded, neutral_norm, prepared, query_norm
from mla_pass.reference import attend, rows
from mla_pass.site import AttentionSite, Norm, Refusal
from mla_pass.statistics import SiteStatistics
from tests.families import FAMILIES, VOCAB, _build, exported
from tests.limits import file_size_limit
from tests.threads import one_thread  # noqa: F401  applies to every test

EXTEND = MlaConfig(rope_mode="extend")
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SMALL = replace(EXTEND, rank=20, rope_dims=6)
IDS = torch.from_numpy(np.random.default_rng(5).integers(3, VOCAB, (2, 40)))


def one_key_for_both_groups() -> Any:
    """Biases, and two kv groups whose keys differ by a turn and a factor for each frequency: one rotated component a
    frequency then holds all there is of the keys. Its weights are bfloat16 numbers."""
    model = _build("qwen2")
    for parameter in model.parameters():  # not the rope's table
        parameter.data = parameter.data.bfloat16().float()
    factor = torch.tensor([[1, 0], [0, 1], [-1, 0], [0, -1], [2, 0], [0, 0.5], [-0.25, 0], [0, -1]]).T[..., None]
    with torch.no_grad():
        for layer in model.model.layers:
            for part in (layer.self_attn.k_proj.weight, layer.self_attn.k_proj.bias):
                keys = part.view(2, 2, 8, -1)  # group, real and imaginary part, frequency
                real, imaginary = keys[0]
                keys[1, 0] = factor[0] * real - factor[1] * imaginary
                keys[1, 1] = factor[1] * real + factor[0] * imaginary
    return model


def scaled_llama() -> Any:
    """A Llama's tensors and activation, but a factor on the embeddings."""
    model = _build("granite", embedding_multiplier=3.0)
    model.load_state_dict(FAMILIES["llama"]().state_dict())
    return model


MODELS: dict[str, Callable[[], Any]] = {**FAMILIES, "one_key": one_key_for_both_groups}


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, list[Any], list[SiteStatistics]]]:
    """Checkpoint folder, sites and statistics of a model, to be read only."""

    @functools.cache
    def make(name: str) -> tuple[Path, list[Any], list[SiteStatistics]]:
        folder = tmp_path_factory.mktemp(name)
        MODELS[name]().save_pretrained(folder / "source")
        graph = exported(name) if name in FAMILIES else export_hf(folder / "source", folder / "graph")
        model = load_model(graph)
        sites = find_sites(model)
        ids = np.random.default_rng(0).integers(3, VOCAB, (5, 48))
        return folder / "source", sites, list(calibrate(sites, instrument(model, sites), ids).sites)

    return make


@pytest.fixture(scope="module")
def written(known: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., DeepseekReport]:
    """Writes a model's checkpoint; the same arguments give the same folder, to be read only."""

    @functools.cache
    def make(name: str, config: MlaConfig = SMALL) -> DeepseekReport:
        source, sites, statistics = known(name)
        return save_deepseek(sites, statistics, config, source, tmp_path_factory.mktemp(name) / "written")

    return make


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def logits(model: Any, ids: torch.Tensor = IDS, **inputs: Any) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(ids, **inputs).logits.double().numpy())


def assert_close(got: np.ndarray, want: np.ndarray, tolerance: float = 5e-6) -> None:
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


# ---- what it computes


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llama_mqa", replace(EXTEND, rank=16, rope_dims=16)),  # nothing un-rotated is left
        ("one_key", replace(EXTEND, rank=32, rope_dims=16)),
    ],
)
def test_nothing_is_lost_where_there_is_nothing_to_lose(written: Any, name: str, config: MlaConfig) -> None:
    report = written(name, config)
    assert report.around < 1e-5 and report.error < 1e-5
    assert_close(logits(load(report.path)), logits(MODELS[name]()))


def with_latents(model: Any, layers: list[tuple[AttentionSite, LatentWeights]]) -> Any:
    """The original model, its attention computed in float64 from its own projections over latent rows."""
    for layer, (site, weights) in zip(model.model.layers, layers, strict=True):

        def forward(
            hidden_states: torch.Tensor, *_: Any, own: Any = layer.self_attn, site: AttentionSite = site,
            weights: LatentWeights = weights, **__: Any,
        ) -> tuple[torch.Tensor, None]:  # fmt: skip
            q, k, v = (p(hidden_states).double().numpy() for p in (own.q_proj, own.k_proj, own.v_proj))
            position, theta, context = np.arange(q.shape[1]), site.rope.theta, []
            for query, y in zip(q, np.concatenate([k, v], axis=2), strict=True):
                cache, keep = rows(weights, theta, y, position), np.tri(len(y), dtype=bool)
                heads = query.reshape(len(query), site.heads, -1)
                context.append(attend(weights, theta, heads, cache, position, keep, scale=own.head_dim**-0.5))
            return own.o_proj(torch.from_numpy(np.stack(context)).float().flatten(2)), None

        layer.self_attn.forward = forward
    return model


@pytest.mark.parametrize("name", ["llama", "llama_yarn", "one_key"])
def test_logits_are_those_of_the_latents_in_the_original(written: Any, known: Any, name: str) -> None:
    report = written(name)
    _, sites, statistics = known(name)
    ladder = Ladder(report.stride, report.stride * np.arange(3))
    weights = [folded(prepared(*pair, 0.1), ladder, 20, 6) for pair in zip(sites, statistics, strict=True)]
    reference = with_latents(MODELS[name](), list(zip(sites, weights, strict=True)))
    want = logits(reference)
    assert_close(logits(load(report.path)), want)
    original = logits(MODELS[name]())
    assert np.abs(want - original).max() > 1e-2 * np.abs(original).max()  # it is lossy


def test_packed_projections_and_partly_rotated_heads(written: Any) -> None:
    report = written("phi3_partial")
    assert report.error < 1e-5 and load(report.path).config.model_type == "deepseek_v3"


def test_frequencies_are_those_that_matter(known: Any, tmp_path: Path) -> None:
    source, sites, statistics = known("llama")
    # Attention falls on the token itself and 20 rows back, where the second pair has come all around its circle.
    distance = np.zeros(48)
    distance[[0, 20]] = 0.5
    statistics = [replace(s, distance=distance) for s in statistics]
    report = save_deepseek(sites, statistics, replace(SMALL, rope_dims=4), source, tmp_path / "out")
    assert report.stride == 2 and report.error < 1e-5
    table = load(report.path).model.rotary_emb.inv_freq.double().numpy()
    np.testing.assert_allclose(table, sites[0].rope.theta[[0, 2]], rtol=1e-6)


def test_half_precision_loses_no_more_than_the_original(known: Any, tmp_path: Path) -> None:
    source, sites, statistics = known("one_key")
    load(source, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    config = replace(EXTEND, rank=32, rope_dims=16)
    report = save_deepseek(sites, statistics, config, tmp_path / "half", tmp_path / "out")
    ours = load(tmp_path / "out")
    assert report.dtype == "bfloat16" and ours.dtype == torch.bfloat16
    exact = logits(load(tmp_path / "half", dtype=torch.float32))
    off = [float(np.sqrt(np.square(logits(m) - exact).mean())) for m in (ours, load(tmp_path / "half"))]
    assert off[0] < 1.5 * off[1]


# ---- in transformers


def test_the_cache_holds_the_latents_alone(written: Any) -> None:
    report = written("llama")
    model = load(report.path)
    assert type(model).__module__.startswith("transformers.")
    cache = model(IDS, use_cache=True).past_key_values
    held = sum(t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values))
    assert held == IDS.numel() * 2 * (20 + 1 + 6) * 4
    assert report.cached == 27 and report.width == 64
    whole = FAMILIES["llama"]()(IDS, use_cache=True).past_key_values
    assert sum(t.nbytes for layer in whole.layers for t in (layer.keys, layer.values)) == IDS.numel() * 2 * 64 * 4


def test_generation_goes_on_as_without_a_cache(written: Any) -> None:
    model = load(written("one_key").path)
    got = model.generate(IDS[:, :9], max_new_tokens=12, do_sample=False, eos_token_id=None)
    want = IDS[:, :9]
    for _ in range(12):
        want = torch.cat([want, torch.from_numpy(logits(model, want)[:, -1:].argmax(-1))], dim=1)
    assert torch.equal(got, want)


def test_padding_on_the_left_changes_nothing(written: Any) -> None:
    model = load(written("llama").path)
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.long), IDS], dim=1)
    mask = torch.cat([torch.zeros(2, 5, dtype=torch.long), torch.ones_like(IDS)], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    got = logits(model, padded, attention_mask=mask, position_ids=positions)[:, 5:]
    assert_close(got, logits(model))


def test_budget_chooses_sizes(written: Any) -> None:
    report = written("llama", replace(EXTEND, budget=0.5))
    assert report.rank + 1 + report.rope_dims == 32
    config = load(report.path).config
    assert (config.kv_lora_rank, config.qk_rope_head_dim, config.head_dim) == (
        report.rank + 1, report.rope_dims, report.rope_dims,
    )  # fmt: skip


# ---- the norm and the ladder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [9, 177, 513])
def test_the_norm_is_neutral(dtype: torch.dtype, width: int) -> None:
    made = neutral_norm(width)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((50, width - 1)))
    x[0] *= 100  # some token always stands out
    module = DeepseekV3RMSNorm(width).to(dtype)
    module.weight.data = torch.from_numpy(made.weight).to(dtype)
    fed = torch.cat([x * made.scale, torch.full((50, 1), made.constant)], dim=1).to(dtype)
    out = module(fed).double().detach() / made.gain
    wrong = (out[:, :-1] - x).norm(dim=1) / x.norm(dim=1)
    rounding = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 2e-3}[dtype]
    assert wrong[1:].max() < rounding and wrong[0] < rounding + 3e-5


def test_a_query_bias_comes_out_of_its_norm_without_rounding() -> None:
    for hidden in (64, 896, 3584):
        made = query_norm(hidden)
        assert made.width > hidden
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            module = DeepseekV3RMSNorm(made.width).to(dtype)
            module.weight.data = torch.from_numpy(made.weight).to(dtype)
            fed = torch.zeros(1, made.width)
            fed[:, -1] = made.constant
            assert module(fed.to(dtype))[0, -1].item() == pytest.approx(made.one, rel=2e-7)


def test_ladders_hold_the_best_component_of_each_pair(known: Any) -> None:
    _, sites, statistics = known("llama")
    components = prepared(sites[0], statistics[0], 0.1).components
    assert [ladder.pairs.tolist() for ladder in ladders(8, 6)] == [[0, 1, 2], [0, 2, 4], [0, 3, 6]]
    assert ladders(4, 16) == []
    moved = on_ladder(components, Ladder(3, np.array([0, 3, 6])))
    assert moved.pair[:3].tolist() == [0, 3, 6]
    for pair, loss in zip(moved.pair[:3], moved.loss[:3], strict=True):
        assert loss == components.loss[components.pair == pair].max()
    assert sorted(moved.loss) == sorted(components.loss) and (np.diff(moved.loss[3:]) <= 0).all()
    saved = saved_losses(components, 8)
    assert saved[5] == components.loss[components.pair == 5].max()
    assert best_ladder(ladders(8, 6), np.array([1, 0, 0, 2, 0, 0, 2, 0])).stride == 3


# ---- what it refuses


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda site: replace(site, softcap=5.0), "has capped logits"),
        (lambda site: replace(site, key=replace(site.key, norm=Norm(site.key.projection.weight, 1e-6))), "has a norm"),
        (lambda site: replace(site, mask=replace(site.mask, window=8)), "has a window of 8 tokens"),
        (lambda site: replace(site, mask=replace(site.mask, kind="additive")), "has a mask other than causal"),
        (lambda site: replace(site, value=replace(site.value, head_dim=8)), "one shape for all layers"),
    ],
)
def test_other_attention_is_refused(
    known: Any, tmp_path: Path, change: Callable[[AttentionSite], AttentionSite], told: str
) -> None:
    source, sites, statistics = known("llama")
    with pytest.raises(MlaPassError, match=f"layers.1.self_attn.*{told}.*mla_pass's own format"):
        save_deepseek([sites[0], change(sites[1])], statistics, SMALL, source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_one_layer_that_cannot_be_read_is_enough(known: Any, tmp_path: Path) -> None:
    source, sites, statistics = known("llama")
    refusal = Refusal("model.layers.1.self_attn", "softmax", "a causal mask", "export it again")
    with pytest.raises(MlaPassError, match="needs every layer.*layers.1.*export it again"):
        save_deepseek([sites[0], refusal], statistics, SMALL, source, tmp_path / "out")


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: _build("mixtral", num_local_experts=4, rope_parameters=ROPE), "lacks 6 tensors"),
        (FAMILIES["gemma"], "activation 'gelu_pytorch_tanh'"),
        (lambda: _build("llama", mlp_bias=True), "has, which that has not, 6 tensors"),
        (lambda: _build("llama", num_hidden_layers=3), "3 layers and 2 attention blocks"),
        (scaled_llama, "its blocks compute something else"),
        (lambda: _build("llama", seed=1), "exported from other weights"),
        (lambda: _build("llama", rope_parameters={**ROPE, "rope_theta": 777.0}), "no rope of"),
        (
            lambda: _build("llama", rope_parameters={**ROPE, "rope_type": "dynamic", "factor": 2.0}),
            "change with the length",
        ),
    ],
)
def test_other_checkpoints_are_refused(known: Any, tmp_path: Path, make: Callable[[], Any], told: str) -> None:
    _, sites, statistics = known("llama")
    make().save_pretrained(tmp_path / "source")
    with pytest.raises(MlaPassError, match=told):
        save_deepseek(sites, statistics, SMALL, tmp_path / "source", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (MlaConfig(), "needs rope_mode='extend'; got 'block'"),
        (replace(EXTEND, cache_dtype="int8"), "needs cache_dtype='same'"),
        (replace(EXTEND, rank=8), "needs rope_dims, too"),
        (replace(EXTEND, rank=8, rope_dims=18), "at most 16 numbers"),
        (replace(EXTEND, rank=100, rope_dims=8), "rank must lie in"),
        (replace(EXTEND, budget=0.01), "holds no latent"),
    ],
)
def test_requests_it_cannot_serve(known: Any, tmp_path: Path, config: MlaConfig, told: str) -> None:
    source, sites, statistics = known("llama")
    with pytest.raises(MlaPassError, match=told):
        save_deepseek(sites, statistics, config, source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_disk_that_fills_up(known: Any, tmp_path: Path) -> None:
    source, sites, statistics = known("llama")
    with file_size_limit(50_000), pytest.raises(MlaPassError, match="cannot write the output folder"):
        save_deepseek(sites, statistics, SMALL, source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_layers_of_other_ropes_and_statistics_of_others(known: Any, tmp_path: Path) -> None:
    source, sites, statistics = known("llama")
    rope = replace(sites[1].rope, theta=sites[1].rope.theta / 2)
    with pytest.raises(MlaPassError, match="one shape for all layers"):
        save_deepseek([sites[0], replace(sites[1], rope=rope)], statistics, SMALL, source, tmp_path / "out")
    with pytest.raises(MlaPassError, match="calibrate this model anew"):
        save_deepseek(sites, statistics[:1], SMALL, source, tmp_path / "out")
    with pytest.raises(MlaPassError, match="no attention block"):
        save_deepseek([], [], SMALL, source, tmp_path / "out")
