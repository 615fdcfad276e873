"""Healing: what it changes and what it leaves, that an interrupted run ends as an uninterrupted one, and refusals."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

import mla_pass
from mla_pass import HealConfig, MlaConfig, MlaPassError, cli
from mla_pass.healing import distill, plot
from mla_pass.healing.config import HELD_OUT
from mla_pass.healing.distill import Distillation, before_logits
from mla_pass.healing.graph_weights import find_trainable, latent_nodes
from mla_pass.healing.graphs import GraphPredictor
from mla_pass.healing.optimizer import Optimizer, inverse_root
from mla_pass.healing.state import SavedState
from mla_pass.onnx.io import load_model
from mla_pass.onnx.perplexity import sample_tokens
from mla_pass.onnx.verify import verify
from mla_pass.onnx.view import OnnxView
from mla_pass.pytorch.graph import TorchGraph, together
from tests.families import VOCAB, exported
from tests.threads import one_thread  # noqa: F401  applies to every test

CONTEXT = 48
SHORT = HealConfig(tokens=4 * 4 * CONTEXT, context=CONTEXT, batch=4)
"""Four steps."""
# Layers alike and a coarse fit, so that shapes are known and there is something to heal.
PLAIN = {
    "calibrate_tokens": 1024, "metric": "output", "metric_mix": 0.1, "layers": "even", "finest_block": 16,
    "block_order": 1, "attention_flops": 1000.0,
}  # fmt: skip


@functools.cache
def written(family: str, dtype: str = "float32") -> np.ndarray:
    """Text that the original writes, [rows, CONTEXT]."""
    model = mla_pass.session(exported(family, dtype=dtype), threads=1)
    return sample_tokens(model, 160 * CONTEXT, length=CONTEXT, batch=160)


@pytest.fixture(scope="module")
def convert(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Converts a family to half its cache; the same arguments give the same folder, to be read only."""

    @functools.cache
    def make(family: str, dtype: str = "float32", **config: object) -> Path:
        settings = MlaConfig(**{**PLAIN, "budget": 0.5, "calibrate_context": CONTEXT, **config})
        result = mla_pass.convert(
            load_model(exported(family, dtype=dtype)), settings, calibrate=written(family, dtype)[:30]
        )
        return result.save(tmp_path_factory.mktemp(family) / "converted")

    return make


def weights(folder: Path) -> dict[str, np.ndarray]:
    return {str(v.name): v.const_value.numpy() for v in load_model(folder).graph.initializers.values()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# ---- what it does


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_the_held_out_loss_falls_and_only_the_latent_attention_changes(
    family: str, convert: Callable[..., Path], tmp_path: Path
) -> None:
    config = replace(SHORT, tokens=16 * SHORT.step_tokens)
    source, folder, text = exported(family), convert(family), written(family)
    healing = mla_pass.heal(source, folder, tmp_path / "out", text=text, config=config)
    assert healing.after < 0.98 * healing.before  # random weights have little rank to find
    assert (healing.steps, healing.tokens, len(healing.losses)) == (16, config.tokens, 16)
    assert healing.held_out_tokens == HELD_OUT * CONTEXT

    # ONNX Runtime and numpy see the same losses on the same rows.
    sessions = [mla_pass.session(path, threads=1) for path in (source, folder, tmp_path / "out")]
    for session, want in zip(sessions[1:], (healing.before, healing.after), strict=True):
        found = verify(sessions[0], session, text[-HELD_OUT:].reshape(-1), context=CONTEXT)
        assert found.kl == pytest.approx(want, rel=1e-3)

    before, after = weights(folder), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == set(healing.weights)
    assert not any("rope_" in name or "norm" in name or "mlp" in name for name in changed)
    assert healing.numbers == sum(before[name].size for name in changed)
    assert all(before[name].dtype == after[name].dtype for name in before)

    record = json.loads((tmp_path / "out" / "mla_pass.json").read_text())
    assert record["healing"]["after"] == healing.after
    assert record["report"] == json.loads((folder / "mla_pass.json").read_text())["report"]
    history = json.loads((tmp_path / "out" / "heal.json").read_text())
    assert [one["loss"] for one in history["held_out"]][:: len(healing.held_out) - 1] == [healing.before, healing.after]
    assert len(healing.held_out) >= 10
    assert set(contents(folder)) <= set(contents(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_weights_keep_their_type_and_the_result_is_that_of_rounded_weights(
    convert: Callable[..., Path], tmp_path: Path
) -> None:
    source, folder = exported("llama", dtype="float16"), convert("llama", "float16")
    text = written("llama", "float16")
    healing = mla_pass.heal(source, folder, tmp_path / "out", text=text, config=SHORT)
    stored = weights(tmp_path / "out")
    assert {stored[name].dtype.name for name in healing.weights} == {"float16"}
    models = load_model(source), load_model(tmp_path / "out")
    distillation = Distillation(*map(GraphPredictor, models), find_trainable(models[1]))
    ids = torch.from_numpy(text[-HELD_OUT:])
    assert distillation.divergence(ids, distillation.aim(ids)) == pytest.approx(healing.after, rel=1e-5)


def test_a_model_at_full_size_is_left_as_it_is(convert: Callable[..., Path], tmp_path: Path) -> None:
    folder = convert("llama", budget=1.0)
    healing = mla_pass.heal(exported("llama"), folder, tmp_path / "out", text=written("llama"), config=SHORT)
    assert healing.steps == 0 and healing.before == healing.after < 1e-6
    assert "nothing to heal" in healing.text()
    before, after = weights(folder), weights(tmp_path / "out")
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_a_budget_of_minutes_ends_and_says_how_far_it_is(convert: Callable[..., Path], tmp_path: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    config = replace(SHORT, tokens=None, minutes=0.02)
    healing = mla_pass.heal(
        exported("llama"), convert("llama"), tmp_path / "out", text=written("llama"), config=config,
        progress=lambda *told: heard.append(told),
    )  # fmt: skip
    assert healing.steps > 0 and 1.2 <= healing.seconds < 30
    assert heard[0] == ("reading the models", 0, 1)
    assert all(0 <= done <= total for _, done, total in heard)
    assert any("held-out KL" in stage for stage, *_ in heard)


# ---- resuming


def interrupted(steps: int) -> Callable[[str, int, int], None]:
    """A progress that is interrupted from the keyboard after so many steps."""
    count = iter(range(1, steps + 1))

    def hear(stage: str, done: int, total: int) -> None:
        if stage.startswith("healing") and next(count) == steps:
            raise KeyboardInterrupt

    return hear


def test_a_resumed_run_ends_as_an_uninterrupted_one(
    convert: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = exported("llama"), convert("llama")
    config = replace(SHORT, tokens=6 * SHORT.step_tokens)
    options = {"text": written("llama")[:20], "config": config}  # 16 windows to train on: the second epoch begins
    whole = mla_pass.heal(*folders, tmp_path / "whole", **options)

    out, state = tmp_path / "out", tmp_path / "out.heal-state"
    with pytest.raises(KeyboardInterrupt, match="out.heal-state; the same command with --resume"):
        mla_pass.heal(*folders, out, **options, progress=interrupted(2))
    assert not out.exists() and json.loads((state / "state.json").read_text())["step"] == 2
    with pytest.raises(KeyboardInterrupt):
        mla_pass.heal(*folders, out, **options, progress=interrupted(3), resume=True)
    assert json.loads((state / "state.json").read_text())["step"] == 5

    # Amid an update weights and state do not fit together: the state before it has to do.
    step = Optimizer.step

    def half(self: Optimizer, factor: float) -> None:
        step(self, factor)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Optimizer, "step", half)
        mla_pass.heal(*folders, out, **options, resume=True)
    assert json.loads((state / "state.json").read_text())["step"] == 5

    resumed = mla_pass.heal(*folders, out, **options, resume=True)
    assert not state.exists()
    assert replace(resumed, seconds=0.0) == replace(whole, seconds=0.0)
    ours, theirs = contents(out), contents(tmp_path / "whole")
    assert ours["model.onnx"] == theirs["model.onnx"] and ours["model.onnx.data"] == theirs["model.onnx.data"]


def test_a_state_is_for_one_run(convert: Callable[..., Path], tmp_path: Path) -> None:
    source, folder, text, out = exported("llama"), convert("llama"), written("llama"), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        mla_pass.heal(source, folder, out, text=text, config=SHORT, progress=interrupted(1))
    with pytest.raises(MlaPassError, match="unfinished run; --resume goes on with it"):
        mla_pass.heal(source, folder, out, text=text, config=SHORT)
    for changes in (
        {"config": replace(SHORT, lr=0.1)}, {"text": text[1:]}, {"converted": convert("llama", budget=0.6)},
        {"original": convert("llama", budget=0.6)},
    ):  # fmt: skip
        given = {"original": source, "converted": folder, "text": text, "config": SHORT, **changes}
        with pytest.raises(MlaPassError, match="over other models, text or options"):
            mla_pass.heal(out=out, **given, resume=True)
    (tmp_path / "out.heal-state" / "state.json").write_text("{")
    with pytest.raises(MlaPassError, match="cannot be read"):
        mla_pass.heal(source, folder, out, text=text, config=SHORT, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out.heal-state"]


def test_a_state_that_cannot_be_written_leaves_the_last_one(tmp_path: Path) -> None:
    checkpoint = SavedState(tmp_path / "state", "a")
    checkpoint.begin(np.arange(6).reshape(2, 3))
    checkpoint.save({"x": torch.ones(3)}, {"step": 1})
    (tmp_path / "state" / "state.json.partial").mkdir()
    with pytest.raises(MlaPassError, match="cannot write the state"):
        checkpoint.save({"x": torch.zeros(3)}, {"step": 2})
    windows, tensors, record = checkpoint.load()
    assert record["step"] == 1 and tensors["x"].tolist() == [1, 1, 1] and windows.tolist() == [[0, 1, 2], [3, 4, 5]]
    (tmp_path / "state" / "state.json.partial").rmdir()
    checkpoint.save({"x": torch.zeros(3)}, {"step": 3})
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == [
        "state.json", "step-3.safetensors", "windows.npy"
    ]  # fmt: skip


# ---- refusals


REFUSALS: dict[str, tuple[dict[str, object], str]] = {
    "not converted": ({"converted": exported}, "no LatentAttention node"),
    "too short": ({"text": np.arange(3, 90)}, "the text has 87 tokens; 4 held-out windows.* need 384"),
    "no such text": ({"text": "nowhere.txt"}, "nowhere.txt cannot be read"),
    "not a text of this model": ({"text": np.full(9000, VOCAB)}, "expected 0 to 96"),
    "not token ids": ({"text": np.ones(9000)}, "expected integers"),
    "too long": ({"config": replace(SHORT, context=257)}, "context is 257; the model has 256 positions"),
    "no such device": ({"device": "abacus"}, "expected cpu or cuda"),
    "nothing to resume": ({"resume": True}, "nothing to resume"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_are_one_sentence_and_leave_nothing(case: str, convert: Callable[..., Path], tmp_path: Path) -> None:
    changes, told = REFUSALS[case]
    changes = {name: value("llama") if callable(value) else value for name, value in changes.items()}
    given = {"original": exported("llama"), "converted": convert("llama"), "text": written("llama"), "config": SHORT}
    with pytest.raises(MlaPassError, match=told) as caught:
        mla_pass.heal(**{**given, "out": tmp_path / "out", **changes})
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_another_vocabulary_is_refused(convert: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(MlaPassError, match="vocabularies have 257 and 97"):
        mla_pass.heal(exported("llama_tied"), convert("llama"), tmp_path / "out", text=written("llama"), config=SHORT)
    assert list(tmp_path.iterdir()) == []


def test_a_taken_folder_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(MlaPassError, match="already holds files"):
        mla_pass.heal("no/model", "no/other", tmp_path)


@pytest.mark.parametrize(
    "changes", [{"minutes": 0}, {"minutes": float("nan")}, {"lr": -1.0}, {"tokens": 0}, {"batch": 0}, {"context": 1}]
)
def test_options_out_of_range(changes: dict) -> None:
    with pytest.raises(MlaPassError, match=f"{next(iter(changes))} must be"):
        HealConfig(**changes)


@pytest.mark.parametrize(("lr", "told"), [(2.0, "healing took the held-out KL from"), (1e30, "healing diverged")])
def test_a_worse_model_is_not_written(lr: float, told: str, convert: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(MlaPassError, match=told):
        mla_pass.heal(
            exported("llama"), convert("llama"), tmp_path / "out", text=written("llama"), config=replace(SHORT, lr=lr)
        )
    assert list(tmp_path.iterdir()) == []


def test_without_torch_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MlaPassError, match=r"healing needs torch.*pip install"):
        mla_pass.heal("a", "b", tmp_path / "out")


# ---- pieces


def test_every_weight_around_the_node_is_found(convert: Callable[..., Path]) -> None:
    def shapes(folder: Path) -> list[tuple[int, ...]]:
        model = load_model(folder)
        found = find_trainable(model)
        assert found.left_out == ()
        return sorted(tuple(model.graph.initializers[name].shape.numpy()) for name in found.names)

    node = latent_nodes(load_model(convert("llama")))[0]
    maps = [tuple(value.shape.numpy()) for value in node.inputs[10:]]
    rank = node.attributes["rank"].as_int() + node.attributes["rope_dim"].as_int()
    plain = [(64, 64), (64, rank), (rank,), *maps, (64,), (64, 64)]
    assert shapes(convert("llama")) == sorted(plain * 2)
    assert shapes(convert("phi3")) == sorted([(64, 128) if place == 0 else s for place, s in enumerate(plain)] * 2)
    assert {(64,), (64, 64)} <= set(shapes(convert("qwen2")))  # biases of the query projection
    absorbed = find_trainable(load_model(convert("llama", absorb="always", rope_mode="extend"))).names
    names = ("latent_proj.bias", "latent_proj.weight", "o_proj_latent.bias", "o_proj_latent.weight")
    assert sorted(absorbed) == sorted(
        f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in (*names, "q_proj_latent.weight")
    )


def test_weights_that_others_read_are_left_out(convert: Callable[..., Path]) -> None:
    model = load_model(convert("llama"))
    values = [model.graph.initializers[name] for name in find_trainable(model).names]
    first, second, *_ = [value for value in values if value.shape == ir.Shape([64, 64])]
    model.graph.append(ir.Node("", "Identity", [first], name="other"))
    twin = ir.val("twin", const_value=second.const_value)
    model.graph.register_initializer(twin)
    found = find_trainable(model)
    assert {first.name, second.name}.isdisjoint(found.names)
    assert sorted(told.split()[0] for told in found.left_out) == sorted([str(first.name), str(second.name)])
    assert "other" in " ".join(found.left_out) and "shares its data" in " ".join(found.left_out)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_gradients_in_pieces_are_those_of_the_whole(
    family: str, convert: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distill, "LOGITS", 7 * VOCAB)
    original, model = load_model(exported(family)), load_model(convert(family))
    trainable = find_trainable(model)
    ids = torch.from_numpy(written(family)[:2])
    distillation = Distillation(GraphPredictor(original), GraphPredictor(model), trainable)
    total = distillation.backward(ids[:1], 0.5) + distillation.backward(ids[1:], 0.5)

    with torch.no_grad():
        graph = TorchGraph(original)
        aim = graph.run(ids, wanted=[graph.logits])[graph.logits].log_softmax(-1)
    graph = TorchGraph(model)
    leaves = [graph.parameters[name].requires_grad_(True) for name in trainable.names]
    found = graph.run(ids, wanted=[graph.logits])[graph.logits].log_softmax(-1)
    loss = (aim.exp() * (aim - found)).sum(-1).mean()
    assert total / 2 == pytest.approx(loss.item(), rel=1e-5)
    for name, want in zip(trainable.names, torch.autograd.grad(loss, leaves), strict=True):
        got = distillation.parameters[name].grad
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5 * float(want.abs().max()))


def test_the_last_product_is_found_behind_a_cap() -> None:
    for family in ("llama", "llama_tied", "gemma2"):
        model = load_model(exported(family))
        logits = next(value for value in model.graph.outputs if value.name == "logits")
        (user, place), *more = before_logits(OnnxView.of(model), logits).uses()
        assert (user.op_type, place, more) == ("MatMul", 0, [])


def test_inverse_root_undoes_a_square() -> None:
    torch.manual_seed(0)
    a = torch.randn(3, 12, 12, dtype=torch.float64)
    square = a @ a.mT + torch.eye(12, dtype=torch.float64)
    root = inverse_root(square)
    # Damped by a thousandth of the mean eigenvalue: alike up to that over the smallest one.
    torch.testing.assert_close(
        root @ square @ root, torch.eye(12, dtype=torch.float64).expand(3, -1, -1), rtol=0, atol=0.05
    )
    assert inverse_root(torch.zeros(4, 4)).isfinite().all()


def test_steps_are_sized_by_the_weight() -> None:
    torch.manual_seed(0)
    parameters = {"matrix": torch.randn(20, 20) * 3, "maps": torch.randn(2, 20, 9), "vector": torch.randn(20) * 0.1}
    before = {name: weight.clone() for name, weight in parameters.items()}
    optimizer = Optimizer(parameters)
    for weight in parameters.values():
        weight.requires_grad_(True)
        weight.grad = torch.randn_like(weight)
    optimizer.step(0.005)
    for name, weight in parameters.items():
        moved = (weight.detach() - before[name]).square().mean().sqrt() / before[name].square().mean().sqrt()
        assert 0.7 * 0.005 < moved < 1.3 * 0.005
        assert weight.grad is None


def test_a_staggered_decoder_stays_one() -> None:
    torch.manual_seed(0)
    weight = torch.randn(2, 6, 6).tril().requires_grad_(True)
    free = weight.detach().clone().requires_grad_(True)
    before = weight.detach().clone()
    optimizer = Optimizer({"key_up": weight, "free": free}, {"key_up"})
    for _ in range(3):
        weight.grad, free.grad = torch.randn(2, 6, 6), torch.randn(2, 6, 6)
        optimizer.step(0.01)
    assert (weight.triu(1) == 0).all() and (free.triu(1) != 0).any()
    assert (weight.detach() != before).tril().sum() == 2 * 21


def test_whitened_steps_go_straight_where_gradients_do_not() -> None:
    # A quadratic loss whose two sides are felt a thousandfold unevenly: its gradient hardly shows the flat directions.
    torch.manual_seed(0)
    left, right = (torch.diag(torch.logspace(0, -1.5, 8, dtype=torch.float64)) for _ in range(2))
    aim, steps = torch.randn(8, 8, dtype=torch.float64), 300
    weight = torch.randn(8, 8, dtype=torch.float64, requires_grad=True)
    plain = weight.detach().clone().requires_grad_(True)
    optimizer = Optimizer({"w": weight})

    def loss(w: torch.Tensor) -> torch.Tensor:
        noise = 0.1 * torch.randn(8, 8, dtype=torch.float64)  # a batch's own idea of where to go
        return 0.5 * (left @ (w - aim + noise) @ right).square().sum()

    for i in range(steps):
        loss(weight).backward()
        optimizer.step(0.05 * (1 - i / steps))
        (gradient,) = torch.autograd.grad(loss(plain), plain)
        with torch.no_grad():
            plain -= (1 - i / steps) * gradient  # the longest steps that the steepest direction allows
    ours, theirs = ((w.detach() - aim).square().mean() for w in (weight, plain))
    assert ours < 0.25 * theirs


def test_without_matplotlib_the_plot_is_said_to_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert plot.plot_losses(tmp_path / "a.svg", [0.3, 0.2], [(0, 0.3), (20, 0.1)], 10) in ("", plot.LEFT_OUT)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert plot.plot_losses(tmp_path / "b.svg", [0.3], [(0, 0.3)], 10) == plot.LEFT_OUT
    assert not (tmp_path / "b.svg").exists()


def test_operands_meet_on_the_device() -> None:
    there, here = torch.ones(2, 3, device="meta"), torch.ones(3)
    assert [x.device.type for x in together("Add", [there, here])] == ["meta", "meta"]
    assert [x.device.type for x in together("Reshape", [there, here])] == ["meta", "cpu"]
    assert [x if x is None else x.device.type for x in together("Gather", [here, None])] == ["cpu", None]


# ---- the command


def test_the_command_heals_and_tells(
    convert: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "ids.npy", written("llama"))
    options = ["--text", tmp_path / "ids.npy", "--tokens", 4 * 4 * CONTEXT, "--context", CONTEXT, "--batch", 4]
    command = [str(x) for x in ("heal", exported("llama"), convert("llama"), tmp_path / "out", *options, "--json")]
    assert cli.main(command) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert told["after"] < told["before"] and told["steps"] == 4 and told["out"] == str(tmp_path / "out")
    assert "held-out KL" in err
    assert cli.main(command) == 1
    assert "already holds files" in capsys.readouterr().err


def test_an_interrupted_command_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt("the state is in out.heal-state")

    monkeypatch.setattr(mla_pass, "heal", stop)
    assert cli.main(["heal", "a", "b", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "mla-pass: the state is in out.heal-state\nmla-pass: interrupted\n"
