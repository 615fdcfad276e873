"""Healing of checkpoints and exported programs.

What is right is told by the ONNX conversion of one and the same fold, whose gradients `test_heal` checks, and by
transformers and torch.export, which run what was written.
"""

from __future__ import annotations

import functools
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.export import ExportedProgram

import mla_pass
from mla_pass import HealConfig, LatentCache, MlaConfig, MlaPassError, cli
from mla_pass.export.fx import export_fx
from mla_pass.healing.checkpoints import CheckpointSubject
from mla_pass.healing.config import HELD_OUT
from mla_pass.healing.distill import Distillation
from mla_pass.healing.graphs import GraphSubject
from mla_pass.healing.programs import ProgramSubject
from mla_pass.healing.subject import Subject
from mla_pass.onnx.io import load_model
from mla_pass.pytorch.fx_convert import convert_exported
from tests.checkpoints import converted, load, source
from tests.families import FAMILIES, exported
from tests.limits import file_size_limit
from tests.test_fx import rows_of
from tests.test_heal import interrupted, written
from tests.threads import one_thread  # noqa: F401  applies to every test

CONTEXT = 48
SHORT = HealConfig(tokens=4 * 4 * CONTEXT, context=CONTEXT, batch=4)
"""Four steps."""
KINDS = ("checkpoint", "program")
GUIDE = ("llama", "qwen2", "mistral", "mixtral", "gemma2", "phi3")
"""A family of each that the MLA-Retrofit guide names."""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.getLogger("torch.__trace").propagate = False  # a test's log is no place for every step of a trace
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@functools.cache
def original_program(family: str, dtype: str = "float32") -> ExportedProgram:
    return export_fx(FAMILIES[family](), dtype=dtype)


@functools.cache
def programs(family: str, cache_dtype: str = "same") -> tuple[ExportedProgram, mla_pass.Result]:
    """A converted program, and the ONNX conversion of the same fold. With rows of 8 bits torch.export drops the detach
    of x + (y - x).detach()."""
    config = MlaConfig(
        budget=0.5, cache_dtype=cache_dtype, calibrate_tokens=1024, calibrate_context=CONTEXT, metric="output",
        metric_mix=0.1, cache="growing",
    )  # fmt: skip
    result = mla_pass.convert(load_model(exported(family)), config, calibrate=written(family)[:30])
    program = convert_exported(original_program(family), config, conversions=result.conversions)
    return program, result


def models(kind: str, family: str = "llama") -> tuple[Any, Any]:
    """An original and its conversion, to be read only."""
    if kind == "checkpoint":
        made = converted(family, 0.5)
        return made.source, made.checkpoint
    return original_program(family), programs(family)[0]


def weights(kind: str, model: Any) -> dict[str, Tensor]:
    """Of a folder, or of a program in memory or in a folder."""
    if kind == "checkpoint":
        return {name: x for path in model.glob("*.safetensors") for name, x in load_file(path).items()
                if path.name != "latent_cache.safetensors"}  # fmt: skip
    program = model if isinstance(model, ExportedProgram) else torch.export.load(model / "model.pt2")
    return {name: x.detach() for name, x in program.state_dict.items()}


def logits(kind: str, model: Any, ids: Tensor) -> np.ndarray:
    """By transformers, or by the program as a module; float64."""
    with torch.no_grad():
        if kind == "checkpoint":
            return load(model)(ids).logits.double().numpy()
        program = model if isinstance(model, ExportedProgram) else torch.export.load(model / "model.pt2")
        past = [torch.zeros(len(ids), x.shape[1], 0, x.shape[3], dtype=x.dtype) for x in rows_of(program)]
        positions = torch.arange(ids.shape[1]).expand_as(ids).contiguous()
        return program.module()(ids, torch.ones_like(ids), positions, past)[0].double().numpy()


def divergence(aim: np.ndarray, found: np.ndarray) -> float:
    """Mean KL over all positions, by numpy."""
    aim, found = (x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)
                  for x in (aim, found))  # fmt: skip
    return float((np.exp(aim) * (aim - found)).sum(-1).mean())


# ---- what it does


@pytest.mark.parametrize("kind", KINDS)
def test_the_held_out_loss_falls_and_only_the_latent_attention_changes(kind: str, tmp_path: Path) -> None:
    source, target = models(kind)
    text, config = written("llama"), replace(SHORT, tokens=16 * SHORT.step_tokens)
    before = {name: x.clone() for name, x in weights(kind, target).items()}
    healing = mla_pass.heal(source, target, tmp_path / "out", text=text, config=config)
    assert healing.after < 0.98 * healing.before  # random weights have little rank to find
    assert (healing.steps, healing.tokens) == (16, config.tokens)

    held_out = torch.from_numpy(text[-HELD_OUT:])
    aim = logits(kind, source, held_out)
    for model, want in ((target, healing.before), (tmp_path / "out", healing.after)):
        assert divergence(aim, logits(kind, model, held_out)) == pytest.approx(want, rel=1e-3)

    after = weights(kind, tmp_path / "out")
    assert all(torch.equal(x, before[name]) for name, x in weights(kind, target).items())  # what was given stays
    assert before.keys() == after.keys() and all(before[name].dtype == after[name].dtype for name in before)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(healing.weights) and all(".self_attn." in name for name in changed)
    assert healing.numbers == sum(before[name].numel() for name in changed)
    record = json.loads((tmp_path / "out" / "mla_pass.json").read_text())
    assert record["healing"]["after"] == healing.after and ("report" in record) == (kind == "checkpoint")
    assert {"heal.json", "heal.svg"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def gradients(subject: Subject, ids: Tensor) -> tuple[float, dict[str, Tensor]]:
    """The loss, and its gradients by the names of the weights."""
    distillation = Distillation(subject.teacher, subject.student, subject.trainable)
    loss = distillation.backward(ids)
    return loss, {name: weight.grad for name, weight in distillation.parameters.items()}


def check_gradients(found: dict[str, Tensor], right: dict[str, Tensor], cache_dtype: str = "same") -> None:
    """Every weight's gradient is that of one in the ONNX graph, or of its transpose; names and places differ there.

    But for a checkpoint's output projection, which reads contexts without the values' mean: that is in its bias. Among
    rows of 8 bits there are numbers on the edge between two.
    """
    tolerance = 1e-3 if cache_dtype == "same" else 1e-2

    def alike(one: Tensor, other: Tensor) -> bool:
        return one.shape == other.shape and bool((one - other).norm() <= tolerance * other.norm() + 1e-9)

    unknown = [
        name for name, got in found.items()
        if not any(alike(got, x) or (x.ndim == 2 and alike(got, x.mT)) for x in right.values())
    ]  # fmt: skip
    assert [name for name in unknown if ".output." not in name] == []


@pytest.mark.parametrize(
    ("family", "cache_dtype"),
    [*((family, "same") for family in ("llama", "mixtral", "gemma2")), ("llama", "float8"),
     *(pytest.param(family, "same", marks=pytest.mark.slow) for family in ("qwen2", "mistral", "phi3"))],
)  # fmt: skip
def test_a_checkpoint_has_the_losses_and_gradients_of_its_onnx_conversion(
    family: str, cache_dtype: str
) -> None:
    made, ids = converted(family, 0.5, cache_dtype=cache_dtype), torch.from_numpy(written(family)[:2])
    loss, found = gradients(CheckpointSubject(made.source, made.checkpoint, "cpu"), ids)
    want, right = gradients(GraphSubject(exported(family), made.onnx, "cpu"), ids)
    assert loss == pytest.approx(want, rel=1e-3)
    check_gradients(found, right, cache_dtype)


@pytest.mark.parametrize(
    ("family", "cache_dtype"),
    [("llama", "same"), ("llama", "float8"),
     *(pytest.param(family, "same", marks=pytest.mark.slow) for family in GUIDE if family != "llama")],
)  # fmt: skip
def test_a_program_has_the_losses_and_gradients_of_its_onnx_conversion(
    family: str, cache_dtype: str, tmp_path: Path
) -> None:
    program, result = programs(family, cache_dtype)
    ids = torch.from_numpy(written(family)[:2])
    loss, found = gradients(ProgramSubject(original_program(family), program, "cpu"), ids)
    want, right = gradients(GraphSubject(exported(family), result.save(tmp_path / "onnx"), "cpu"), ids)
    assert loss == pytest.approx(want, rel=1e-3)
    check_gradients(found, right, cache_dtype)


def test_keys_and_values_behind_norms_stay_the_originals() -> None:
    made = converted("qwen3", 0.5)
    for subject in (
        CheckpointSubject(made.source, made.checkpoint, "cpu"),
        ProgramSubject(original_program("qwen3"), programs("qwen3")[0], "cpu"),
    ):
        names = subject.trainable.names
        assert not [name for name in names if "norm" in name or "k_proj" in name or "v_proj" in name]
        assert not [name for name in names if ".key." in name or ".value." in name]
        assert subject.trainable.left_out == ()


@pytest.mark.parametrize("kind", KINDS)
def test_weights_keep_their_type_and_the_result_is_that_of_rounded_weights(kind: str, tmp_path: Path) -> None:
    if kind == "checkpoint":
        made = converted("llama", 0.5, "bfloat16")
        source, target = made.source, made.checkpoint
    else:
        source = original_program("llama", "bfloat16")
        target = mla_pass.convert(
            source, MlaConfig(budget=0.5, calibrate_tokens=1024, calibrate_context=CONTEXT, metric="output"),
            calibrate=written("llama")[:30],
        )  # fmt: skip
    text, out = written("llama"), tmp_path / "out"
    healing = mla_pass.heal(source, target, out, text=text, config=replace(SHORT, lr=0.02))
    stored = weights(kind, out)
    assert {stored[name].dtype for name in healing.weights} == {torch.bfloat16}
    ids = torch.from_numpy(text[-HELD_OUT:])
    subject = (CheckpointSubject(source, out, "cpu") if kind == "checkpoint"
               else ProgramSubject(source, out / "model.pt2", "cpu"))  # fmt: skip
    distillation = Distillation(subject.teacher, subject.student, subject.trainable)
    assert distillation.divergence(ids, distillation.aim(ids)) == pytest.approx(healing.after, rel=1e-4)


def test_a_staggered_decoder_stays_one(tmp_path: Path) -> None:
    """Its zeros are what the kernels do not read."""
    options = {"finest_block": 16, "attention_flops": 1000.0, "block_order": 1}
    made = converted("llama", 0.5, **options)
    mla_pass.heal(made.source, made.checkpoint, tmp_path / "out", text=written("llama"), config=SHORT)
    before, after = (weights("checkpoint", folder) for folder in (made.checkpoint, tmp_path / "out"))
    names = [name for name in before if name.endswith("key_up")]
    assert len(names) == 2
    for name in names:
        assert (before[name] == 0).any() and torch.equal(before[name] == 0, after[name] == 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_as_an_uninterrupted_one(kind: str, tmp_path: Path) -> None:
    given, options = models(kind), {"text": written("llama")[:20], "config": SHORT}
    whole = mla_pass.heal(*given, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt, match="out.heal-state; the same command with --resume"):
        mla_pass.heal(*given, tmp_path / "out", **options, progress=interrupted(2))
    assert not (tmp_path / "out").exists()
    with pytest.raises(MlaPassError, match="over other models, text or options"):
        mla_pass.heal(*given, tmp_path / "out", text=written("llama")[1:21], config=SHORT, resume=True)
    resumed = mla_pass.heal(*given, tmp_path / "out", **options, resume=True)
    assert replace(resumed, seconds=0.0) == replace(whole, seconds=0.0)
    ours, theirs = (weights(kind, tmp_path / name) for name in ("out", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_program_on_disk_heals_as_in_memory(tmp_path: Path) -> None:
    given = models("program")
    for program, name in zip(given, ("original.pt2", "latent.pt2"), strict=True):
        torch.export.save(program, tmp_path / name)
    here = mla_pass.heal(*given, tmp_path / "here", text=written("llama"), config=SHORT)
    files = tmp_path / "original.pt2", tmp_path / "latent.pt2"
    there = mla_pass.heal(*files, tmp_path / "there", text=written("llama"), config=SHORT)
    assert replace(there, seconds=0.0) == replace(here, seconds=0.0)
    record = json.loads((tmp_path / "there" / "mla_pass.json").read_text())
    assert record["healing"]["original"] == str(files[0])
    again = mla_pass.heal(
        given[0], tmp_path / "here" / "model.pt2", tmp_path / "again", text=written("llama"), config=SHORT
    )
    assert again.before == pytest.approx(here.after, rel=1e-5)


def test_what_a_healed_checkpoint_cannot_hold_is_left_out_and_said(tmp_path: Path) -> None:
    made = converted("llama", 0.5)
    shutil.copytree(made.checkpoint, tmp_path / "both")
    shutil.copytree(made.onnx, tmp_path / "both" / "onnx")
    healing = mla_pass.heal(
        made.source, tmp_path / "both", tmp_path / "out", text=written("llama"), config=SHORT
    )
    assert [note.partition(" ")[0] for note in healing.notes] == ["latent_cache.safetensors", "onnx"]
    assert not {"onnx", "latent_cache.safetensors"} & {path.name for path in (tmp_path / "out").iterdir()}
    with pytest.raises(MlaPassError, match="has no latent_cache.safetensors: it was healed"):
        LatentCache.from_pretrained(tmp_path / "out")


def test_a_checkpoint_that_transformers_saved_anew_heals_as_well(tmp_path: Path) -> None:
    made = converted("llama", 0.5)
    made.model().save_pretrained(tmp_path / "saved")
    healing = mla_pass.heal(made.source, tmp_path / "saved", tmp_path / "out", text=written("llama"), config=SHORT)
    assert healing.after < healing.before
    assert (tmp_path / "out" / "model.safetensors").is_file() and load(tmp_path / "out") is not None


def test_the_original_writes_what_its_onnx_export_writes() -> None:
    made = converted("llama", 0.5)
    rows = CheckpointSubject(made.source, made.checkpoint, "cpu").written(5, 20)
    np.testing.assert_array_equal(rows, GraphSubject(exported("llama"), made.onnx, "cpu").written(5, 20))


# ---- refusals


def garbage(tmp_path: Path) -> Path:
    (tmp_path / "bad.pt2").write_bytes(b"no program")
    return tmp_path / "bad.pt2"


def cut_short(tmp_path: Path) -> Path:
    """A converted checkpoint whose latent weights end in the middle."""
    shutil.copytree(converted("llama", 0.5).checkpoint, tmp_path / "cut")
    file = tmp_path / "cut" / "latent-00001.safetensors"
    file.write_bytes(file.read_bytes()[:2000])
    return tmp_path / "cut"


Given = Callable[[Path], Any]
REFUSALS: dict[str, tuple[str, dict[str, Given], str]] = {
    "no original": ("checkpoint", {"original": lambda t: t / "no"}, "no does not exist; expected the folder of a"),
    "two kinds": ("checkpoint", {"original": lambda t: exported("llama")},
                  "the original is an ONNX model and the conversion a Hugging Face checkpoint"),
    "not converted": ("checkpoint", {"converted": lambda t: source("llama")}, "is no converted checkpoint"),
    "cut short": ("checkpoint", {"converted": cut_short}, "cannot be (read|loaded)"),
    "other vocabulary": ("checkpoint", {"original": lambda t: source("llama_tied")}, "vocabularies have 257 and 97"),
    "too long": ("checkpoint", {"config": lambda t: replace(SHORT, context=257)}, "the model has 256 positions"),
    "no tokenizer": ("checkpoint", {"text": lambda t: Path(__file__)}, "has no tokenizer"),
    "no program": ("program", {"original": garbage}, "bad.pt2 is no program that torch.export.save wrote"),
    "something else": ("program", {"original": lambda t: torch.nn.Linear(2, 2)}, "a Linear is no exported program"),
    "program not converted": ("program", {"converted": lambda t: original_program("llama")}, "has no latent attention"),
    "original converted": ("program", {"original": lambda t: programs("llama")[0]}, "its inputs are unknown"),
    "another model's": ("program", {"original": lambda t: original_program("gemma3")}, "inputs, the converted one"),
    "text": ("program", {"text": lambda t: Path(__file__)}, "an exported program has no tokenizer"),
    "its own text": ("program", {"text": lambda t: "self"}, "an exported program cannot write a text"),
    "beyond the tables": ("program", {"config": lambda t: replace(SHORT, context=257)}, "the model has 256 positions"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_are_one_sentence_and_leave_nothing(case: str, tmp_path: Path) -> None:
    kind, changes, told = REFUSALS[case]
    (tmp_path / "in").mkdir()
    original, target = models(kind)
    given = {"original": original, "converted": target, "text": written("llama"), "config": SHORT}
    given |= {name: value(tmp_path / "in") for name, value in changes.items()}
    with pytest.raises(MlaPassError, match=told) as caught:
        mla_pass.heal(out=tmp_path / "out", **given)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_leaves_the_state_and_no_half_a_folder(kind: str, tmp_path: Path) -> None:
    given, options = models(kind), {"text": written("llama"), "config": SHORT}
    with pytest.raises(KeyboardInterrupt):
        mla_pass.heal(*given, tmp_path / "out", **options, progress=interrupted(4))
    with file_size_limit(20_000), pytest.raises(MlaPassError, match="cannot write") as caught:
        mla_pass.heal(*given, tmp_path / "out", **options, resume=True)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["out.heal-state"]
    mla_pass.heal(*given, tmp_path / "out", **options, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_worse_model_is_not_written(kind: str, tmp_path: Path) -> None:
    with pytest.raises(MlaPassError, match="healing took the held-out KL from"):
        mla_pass.heal(*models(kind), tmp_path / "out", text=written("llama"), config=replace(SHORT, lr=2.0))
    assert list(tmp_path.iterdir()) == []


# ---- the command


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_heals_and_tells(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "ids.npy", written("llama"))
    given = models(kind)
    if kind == "program":
        for program, name in zip(given, ("a.pt2", "b.pt2"), strict=True):
            torch.export.save(program, tmp_path / name)
        given = tmp_path / "a.pt2", tmp_path / "b.pt2"
    options = ["--text", tmp_path / "ids.npy", "--tokens", 4 * 4 * CONTEXT, "--context", CONTEXT, "--batch", 4]
    command = [str(x) for x in ("heal", *given, tmp_path / "out", *options)]
    assert cli.main([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["after"] < told["before"] and told["steps"] == 4
    assert cli.main(command) == 1 and "already holds files" in capsys.readouterr().err
