"""The baselines of the quality benchmark on tiny random models: exact where they can be, and smaller where they say."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from mla_pass.errors import MlaPassError
from tests import families

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from benchmarks.baselines import METHODS, restore, window_losses  # noqa: E402 - these import torch themselves
from benchmarks.baselines.calibrate import input_moments  # noqa: E402
from benchmarks.baselines.care import covariance_svd  # noqa: E402
from benchmarks.baselines.choose import choose_cut, descend  # noqa: E402
from benchmarks.baselines.convert import apply, keep_all  # noqa: E402
from benchmarks.baselines.geometry import Geometry, read_geometry  # noqa: E402
from benchmarks.baselines.lowrank import Stack  # noqa: E402
from benchmarks.baselines.rope_cut import RopeCut, key_basis  # noqa: E402
from benchmarks.baselines.svd import weight_svd  # noqa: E402
from benchmarks.baselines.transmla import balanced_pca  # noqa: E402

FITS = {"transmla": balanced_pca, "care": covariance_svd, "svd": weight_svd}
IDS = torch.from_numpy(np.random.default_rng(0).integers(0, families.VOCAB, (6, 32)))
EXACT = {"rtol": 0, "atol": 1e-4}  # float32 logits of size 1 to 10 after two layers
G, D = 2, 16

makers = pytest.mark.parametrize("make", [families.llama, families.llama_mha, families.llama_mqa, families.qwen2])
methods = pytest.mark.parametrize("method", METHODS)
fits = pytest.mark.parametrize("name", FITS)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Operators this small run ten times slower on threads that wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def logits(model: Any, ids: Any = IDS) -> Any:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def plant(model: Any, rank: int) -> None:
    """Keys whose heads are multiples of the first, and values of the given rank: GQA that hides a small MLA."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in model.base_model.layers:
            keys, values = layer.self_attn.k_proj, layer.self_attn.v_proj
            for head in range(1, G):
                keys.weight[head * D : (head + 1) * D] = 0.5 * head * keys.weight[:D]
                if keys.bias is not None:
                    keys.bias[head * D : (head + 1) * D] = 0.5 * head * keys.bias[:D]
            left = torch.randn(G * D, rank, generator=generator)
            values.weight.copy_(left @ values.weight[:rank] / rank**0.5)
            if values.bias is not None:
                values.bias.copy_(left @ values.bias[:rank])


class TestExact:
    @makers
    @methods
    def test_full_size_is_the_original(self, make: Callable[[], Any], method: str) -> None:
        model = make()
        before, geometry = logits(model), read_geometry(model)
        found = METHODS[method](model, IDS, 1.0)
        assert found.row == 2 * geometry.keys
        torch.testing.assert_close(logits(model), before, **EXACT)

    @makers
    def test_rotating_heads_together_commutes_with_rotary_positions(self, make: Callable[[], Any]) -> None:
        model = make()
        before, moments = logits(model), input_moments(model, IDS)
        geometry = read_geometry(model)
        apply(model, RopeCut(heads=geometry.kv_heads), moments, moments, keep_all, 2 * geometry.keys)
        torch.testing.assert_close(logits(model), before, **EXACT)

    @pytest.mark.parametrize("make", [families.llama, families.qwen2])
    @fits
    def test_a_planted_small_cache_is_recovered(self, make: Callable[[], Any], name: str) -> None:
        model = make()
        plant(model, rank=5)
        before, moments = logits(model), input_moments(model, IDS)
        found = apply(model, RopeCut(), moments, moments, FITS[name], D + 5)
        assert found.row == D + 5
        torch.testing.assert_close(logits(model), before, **EXACT)
        apply(model, RopeCut(), moments, moments, FITS[name], D + 3)
        assert (logits(model) - before).abs().max() > 0.01

    @methods
    def test_restored_is_the_original_to_the_bit(self, method: str) -> None:
        model = families.qwen2()
        before = logits(model)
        METHODS[method](model, IDS, 0.5)
        assert not torch.equal(logits(model), before)
        restore(model)
        assert torch.equal(logits(model), before)


class TestSize:
    @pytest.mark.parametrize("budget", [0.125, 0.3, 0.5, 0.75])
    @methods
    def test_the_row_is_the_budget(self, method: str, budget: float) -> None:
        model = families.llama()
        found = METHODS[method](model, IDS, budget)
        assert found.row == int(budget * 2 * G * D)
        for layer in model.base_model.layers:
            assert layer.self_attn.row == found.row == layer.self_attn.down.shape[0]
            rank, dims = layer.self_attn.key_up.shape[-1] - 1, layer.self_attn.rope_query.shape[-1]
            assert rank + dims == found.row and f"rank {rank} + {dims} rope dims" in found.note

    @pytest.mark.parametrize("make", [families.llama, families.qwen2])
    @fits
    def test_a_larger_row_errs_less(self, make: Callable[[], Any], name: str) -> None:
        model = make()
        moments = input_moments(model, IDS)
        apply(model, RopeCut(), moments, moments, keep_all, 0)
        limit = logits(model)
        errors = []
        for row in (20, 32, 44, 56, 64):
            apply(model, RopeCut(), moments, moments, FITS[name], row)
            errors.append(float((logits(model) - limit).square().mean()))
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 1e-8 < errors[-2]

    @pytest.mark.parametrize("budget", [0.0, -1.0, 1.5])
    def test_budgets_out_of_range_are_refused(self, budget: float) -> None:
        with pytest.raises(MlaPassError, match="the budget is"):
            METHODS["svd"](families.llama(), IDS, budget)

    def test_a_budget_without_room_is_refused(self) -> None:
        with pytest.raises(MlaPassError, match="a row of 1 numbers has no room"):
            METHODS["svd"](families.llama(), IDS, 1 / 64)

    @pytest.mark.parametrize(
        ("make", "reason"), [(families.qwen3, "qwen3 is not built like"), (families.llama_yarn, "scale the scores")]
    )
    def test_models_it_cannot_read_are_refused(self, make: Callable[[], Any], reason: str) -> None:
        with pytest.raises(MlaPassError, match=reason):
            METHODS["svd"](make(), IDS, 0.5)


class TestRopeCut:
    @pytest.mark.parametrize("cut", [RopeCut(), RopeCut(4), RopeCut(4, 2), RopeCut(2, 1, 2), RopeCut(8, 8)])
    def test_the_basis_is_orthonormal_and_strongest_first(self, cut: RopeCut) -> None:
        geometry = Geometry(1, 64, 6, 3, 16)
        random = torch.randn(48, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        moment = random @ random.T
        basis = key_basis(moment, geometry, cut)
        rows = torch.cat([basis.rope, basis.nope])
        assert len(basis.rope) == cut.dims(geometry) == 2 * len(basis.frequencies)
        torch.testing.assert_close(rows @ rows.T, torch.eye(48, dtype=torch.float64))
        energy = (rows @ moment @ rows.T).diagonal()
        assert energy[: len(basis.rope)].mean() > energy[len(basis.rope) :].mean()

    def test_frequencies_of_a_folded_cut(self) -> None:
        geometry, moment = Geometry(1, 64, 4, 2, 16), torch.eye(32, dtype=torch.float64)
        assert key_basis(moment, geometry, RopeCut()).frequencies.tolist() == list(range(8))
        assert key_basis(moment, geometry, RopeCut(4, 2)).frequencies.tolist() == [0, 2, 4, 6]
        doubled = key_basis(moment, geometry, RopeCut(2, 1, 2)).frequencies.tolist()
        assert doubled == [0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7, 6, 7]

    @pytest.mark.parametrize("make", [families.llama, families.qwen2])
    def test_one_layer_against_complex_arithmetic(self, make: Callable[[], Any]) -> None:
        """One rotated component per frequency, the rest without positions: written out in numpy, in float64."""
        model = make()
        attention = model.base_model.layers[0].self_attn
        inputs = np.random.default_rng(3).standard_normal((12, 64))
        moments = torch.zeros(2, 65, 65, dtype=torch.float64) + torch.eye(65, dtype=torch.float64)
        apply(model, RopeCut(), moments, moments, keep_all, 2 * G * D)
        hidden = torch.from_numpy(inputs).float()[None]
        positions = model.base_model.rotary_emb(hidden, torch.arange(12)[None])
        with torch.no_grad():
            found = model.base_model.layers[0].self_attn(hidden, positions)[0][0].numpy()
        np.testing.assert_allclose(found, by_hand(attention, inputs), rtol=0, atol=2e-5)


def by_hand(attention: Any, inputs: np.ndarray) -> np.ndarray:
    """Output [T, hidden]; the keys' moment is that of white inputs with a one appended that knows nothing of them."""
    weights = {}
    for name in ("q_proj", "k_proj", "v_proj"):
        linear = getattr(attention, name)
        bias = np.zeros(len(linear.weight)) if linear.bias is None else linear.bias.detach().double().numpy()
        weights[name] = (linear.weight.detach().double().numpy(), bias)
    query, key, value = (inputs @ weight.T + bias for weight, bias in weights.values())
    tokens, half = len(inputs), D // 2
    query, key, value = (x.reshape(tokens, -1, D) for x in (query, key, value))
    query, key = query[..., :half] + 1j * query[..., half:], key[..., :half] + 1j * key[..., half:]
    whole = np.concatenate([weights["k_proj"][0], weights["k_proj"][1][:, None]], 1).reshape(G, 2, half, -1)
    angles = np.arange(tokens)[:, None] - np.arange(tokens)[None]
    scores = np.zeros((4, tokens, tokens))
    for i in range(half):
        rows = np.concatenate([whole[:, 0, i], whole[:, 1, i]], 1)  # both parts are samples of one real variable
        basis = np.linalg.eigh(rows @ rows.T)[1][:, ::-1]
        turn = np.exp(1j * angles * 10000.0 ** (-i / half))
        for head in range(4):
            for c in range(G):
                a = basis[head // 2, c] * query[:, head, i]
                b = key[:, :, i] @ basis[:, c]
                scores[head] += ((a[:, None].conj() * b[None]) * (turn.conj() if c == 0 else 1)).real
    scores = np.where(np.tril(np.ones((tokens, tokens), bool)), scores / D**0.5, -np.inf)
    weight = np.exp(scores - scores.max(-1, keepdims=True))
    weight /= weight.sum(-1, keepdims=True)
    out = np.concatenate([weight[head] @ value[:, head // 2] for head in range(4)], 1)
    return out @ attention.o_proj.weight.detach().double().numpy().T


class TestChoice:
    @staticmethod
    def best(row: int, wanted: RopeCut) -> RopeCut:
        def loss(cut: RopeCut) -> float:
            return abs(np.log2(cut.fold / wanted.fold)) + abs(np.log2(cut.heads / wanted.heads)) + abs(
                np.log2(cut.collapse / wanted.collapse)
            )  # fmt: skip

        return choose_cut(Geometry(1, 64, 6, 3, 64), row, loss)

    @pytest.mark.parametrize("wanted", [RopeCut(), RopeCut(4), RopeCut(8, 4), RopeCut(2, 2), RopeCut(2, 1, 2)])
    def test_finds_the_best_in_either_direction(self, wanted: RopeCut) -> None:
        assert self.best(192, wanted) == wanted

    def test_keeps_to_what_fits(self) -> None:
        assert self.best(40, RopeCut()).dims(Geometry(1, 64, 6, 3, 64)) == 32
        assert self.best(384, RopeCut(8, 8)) == RopeCut(heads=3)  # at full size nothing need be lost

    def test_stops_at_the_first_rise(self) -> None:
        assert descend([3, 2, 5, 1], float) == 2
        assert descend([3], float) == 3


def test_values_weigh_as_much_as_keys() -> None:
    """Large keys must not crowd out the values: balanced PCA does not depend on the scale of the keys."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 33, dtype=torch.float64, generator=generator)
    moment = torch.eye(33, dtype=torch.float64)
    scaled = weight.clone()
    scaled[:20] *= 100
    low, high = (balanced_pca(Stack(w, moment, 20, 0), 12) for w in (weight, scaled))
    error = ((low.up[:, :-1] @ low.down - weight)[20:]).norm()
    torch.testing.assert_close((high.up[:, :-1] @ high.down - scaled)[20:].norm(), error)
    crowded = covariance_svd(Stack(scaled, moment, 20, 0), 12)
    assert (crowded.up[:, :-1] @ crowded.down - scaled)[20:, :-1].norm() > 1.5 * error


def test_loss_of_windows() -> None:
    model = families.llama()
    scores = torch.log_softmax(logits(model).double(), -1)[:, :-1]
    expected = -scores.gather(-1, IDS[:, 1:, None])[..., 0].mean(1)
    torch.testing.assert_close(window_losses(model, IDS), expected, rtol=0, atol=1e-6)
