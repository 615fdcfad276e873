"""The command's manners: exit codes, one-sentence errors, JSON on request, results on stdout and all else on stderr."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import mla_pass
from mla_pass import cli
from mla_pass.config import MlaConfig
from mla_pass.report import Report
from mla_pass.statistics import Calibration
from tests import latent_toy

COMMANDS = ("export", "explain", "convert", "heal", "verify", "generate", "perplexity", "env")
WORDS = ("<unk>", "<s>", "</s>", *(f"w{number}" for number in range(3, 61)))


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A latent-attention model with 61 tokens and a tokenizer of 61 words."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = latent_toy.save(tmp_path_factory.mktemp("toy"), latent_toy.weights())
    vocab = {word: number for number, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """300 words the toy knows."""
    path = tmp_path / "text.txt"
    path.write_text(" ".join(WORDS[number] for number in np.random.default_rng(0).integers(3, 61, 300)))
    return path


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def fails_with_one_sentence(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert run(*arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("mla-pass: ")]
    assert len(lines) == 1, err
    return lines[0]


# ---- arguments


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(command, "--help")
    assert stop.value.code == 0
    assert "--json" in capsys.readouterr().out


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("--help")
    words = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert set(COMMANDS) <= words


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("no-such-command",),
        ("convert", "model.onnx"),
        ("convert", "model.onnx", "out", "--rope-mode", "sideways"),
        ("convert", "model.onnx", "out", "--budget", "half"),
        ("convert", "model.onnx", "out", "--rank", "8", "--budget", "0.5"),
        ("convert", "model.onnx", "out", "--rope-dims", "8"),
        ("generate", "model"),
        ("export", "source", "out", "--dtype", "int4"),
    ],
)
def test_wrong_arguments_exit_with_2(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("usage: ")


# ---- errors


@pytest.mark.parametrize(
    "arguments",
    [
        ("export", "no/such/checkpoint", "out"),
        ("explain", "no/such/model"),
        ("convert", "no/such/model", "out"),
        ("verify", "no/such/model", "no/such/other"),
        ("generate", "no/such/model", "--prompt", "w3"),
        ("perplexity", "no/such/model", "--text", "no/such/text"),
    ],
)
def test_a_missing_model_is_one_sentence(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no/such" in fails_with_one_sentence(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["explain", "convert", "generate", "perplexity", "verify"])
def test_a_file_that_is_no_model_is_one_sentence(
    command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, text: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"this is not a protobuf" * 40)
    rest = {
        "convert": (tmp_path / "out",),
        "generate": ("--prompt", "w3"),
        "perplexity": ("--text", text),
        "verify": (folder,),
    }
    told = fails_with_one_sentence(capsys, command, folder, *rest.get(command, ()))
    assert "model.onnx" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("budget", ["0", "-0.5", "1.5", "nan"])
def test_a_budget_out_of_range_is_one_sentence(budget: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    told = fails_with_one_sentence(capsys, "convert", "model.onnx", tmp_path / "out", f"--budget={budget}")
    assert "budget must lie in (0, 1]" in told


def test_a_taken_output_folder_is_told_before_any_work(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "keep.txt").write_text("mine")
    told = fails_with_one_sentence(capsys, "convert", "no/such/model", tmp_path)
    assert str(tmp_path) in told
    assert [path.name for path in tmp_path.iterdir()] == ["keep.txt"]


def test_text_that_is_too_short_names_what_it_needs(capsys: pytest.CaptureFixture[str], toy: Path, text: Path) -> None:
    assert "16384" in fails_with_one_sentence(capsys, "perplexity", toy, "--text", text)


def test_text_that_is_not_utf8_is_one_sentence(capsys: pytest.CaptureFixture[str], toy: Path, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("Fähre".encode("latin-1"))
    assert "latin.txt" in fails_with_one_sentence(capsys, "perplexity", toy, "--text", tmp_path / "latin.txt")


def test_an_interrupt_exits_with_130(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mla_pass.env.environment", interrupt)
    assert run("env") == 130
    assert capsys.readouterr().err == "mla-pass: interrupted\n"


def test_a_bug_is_not_dressed_up_as_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("mla_pass.env.environment", fail)
    with pytest.raises(ZeroDivisionError):
        run("env")


def test_the_module_runs_as_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mla_pass"]
    good = subprocess.run([*command, "env", "--json"], cwd=tmp_path, capture_output=True, text=True)
    assert (good.returncode, json.loads(good.stdout)["mla_pass"]) == (0, mla_pass.__version__)
    bad = subprocess.run([*command, "explain", "nowhere"], cwd=tmp_path, capture_output=True, text=True)
    assert (bad.returncode, bad.stdout) == (1, "")
    assert "Traceback" not in bad.stderr


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    command = f"{sys.executable} -m mla_pass env --json | true; echo ${{PIPESTATUS[0]}}"
    ran = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert (ran.stdout, ran.stderr) == ("0\n", "")


# ---- results


def test_env_tells_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("env", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["numpy"] == np.__version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert run("env") == 0
    assert f"numpy              {np.__version__}" in capsys.readouterr().out


def test_generate_prints_text_on_stdout_and_numbers_on_stderr(capsys: pytest.CaptureFixture[str], toy: Path) -> None:
    assert run("generate", toy, "--prompt", "w5 w6", "--max-new-tokens", 5) == 0
    out, err = capsys.readouterr()
    assert out.startswith("w5 w6")
    assert len(out) > len("w5 w6\n")
    assert "5 tokens" in err
    assert "bytes per token" in err


def test_generate_runs_several_prompts_as_one_batch(capsys: pytest.CaptureFixture[str], toy: Path) -> None:
    prompts = ("w5 w6 w7", "w9")
    alone = []
    for prompt in prompts:
        assert run("generate", toy, "--prompt", prompt, "--max-new-tokens", 6, "--json") == 0
        alone += json.loads(capsys.readouterr().out)["token_ids"]
    both = [argument for prompt in prompts for argument in ("--prompt", prompt)]
    assert run("generate", toy, *both, "--max-new-tokens", 6, "--json") == 0
    done = json.loads(capsys.readouterr().out)
    assert done["token_ids"] == alone
    assert done["cache_bytes_per_token"] == (6 + 2) * 4


def test_sampling_follows_the_seed(capsys: pytest.CaptureFixture[str], toy: Path) -> None:
    def sample(seed: int) -> list[list[int]]:
        options = ("--temperature", 3, "--max-new-tokens", 20, "--seed", seed, "--json")
        assert run("generate", toy, "--prompt", "w5", *options) == 0
        token_ids: list[list[int]] = json.loads(capsys.readouterr().out)["token_ids"]
        return token_ids

    assert sample(1) == sample(1) != sample(2)


def test_perplexity_is_the_mean_loss(capsys: pytest.CaptureFixture[str], toy: Path, text: Path) -> None:
    assert run("perplexity", toy, "--text", text, "--windows", 3, "--context", 50, "--json") == 0
    measured = json.loads(capsys.readouterr().out)
    ids = np.array([WORDS.index(word) for word in text.read_text().split()][:150]).reshape(3, 50)
    losses = []
    for window in ids:
        logits = latent_toy.reference(latent_toy.weights(), window)[:-1]
        log_sum = np.log(np.exp(logits).sum(-1))
        losses.append((log_sum - logits[np.arange(49), window[1:]]).mean())
    assert measured["tokens"] == 3 * 49
    assert measured["nll"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert measured["stderr"] == pytest.approx(np.std(losses, ddof=1) / np.sqrt(3), rel=1e-4)


def test_verify_finds_a_model_equal_to_itself_and_not_to_another(
    capsys: pytest.CaptureFixture[str], toy: Path, text: Path, tmp_path: Path
) -> None:
    assert run("verify", toy, toy, "--tokens", 64, "--json", "--max-kl", 0) == 0
    same = json.loads(capsys.readouterr().out)
    assert (same["kl"], same["top1"], same["largest_difference"], same["tokens"]) == (0.0, 1.0, 0.0, 64)

    other_weights = latent_toy.weights(seed=1)
    other = latent_toy.save(tmp_path / "other", other_weights)
    assert run("verify", toy, other, "--text", text, "--tokens", 40, "--json", "--max-kl", 0.01) == 1
    found = json.loads(capsys.readouterr().out)
    ids = np.array([WORDS.index(word) for word in text.read_text().split()][:40])
    p, q = (latent_toy.reference(w, ids) for w in (latent_toy.weights(), other_weights))
    p, q = (logits - np.log(np.exp(logits).sum(-1, keepdims=True)) for logits in (p, q))
    assert found["kl"] == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), rel=1e-4)
    assert found["top1"] == (p.argmax(-1) == q.argmax(-1)).mean()


def test_verify_refuses_another_vocabulary(capsys: pytest.CaptureFixture[str], toy: Path, tmp_path: Path) -> None:
    other = latent_toy.save(tmp_path / "other", latent_toy.weights(vocab=67))
    assert "61 and 67" in fails_with_one_sentence(capsys, "verify", toy, other, "--tokens", 8)


# ---- convert: what reaches the library


STATISTICS = Calibration((), np.arange(6).reshape(2, 3), np.arange(6).reshape(2, 3), "output")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Records what `mla_pass.convert` is called with; its result saves an empty folder."""
    made: list[dict[str, Any]] = []

    def convert(
        model: Path, config: MlaConfig, *, calibrate: object, calibration: object, progress: Any
    ) -> SimpleNamespace:  # fmt: skip
        progress("fold", 0, 2)
        progress("fold", 2, 2)
        made.append({"model": model, "config": config, "calibrate": calibrate, "calibration": calibration})

        def save(out: Path, *, bundle: bool) -> None:
            out.mkdir()
            if bundle:
                (out / "library").touch()

        return SimpleNamespace(report=Report((), (), "float32", ()), save=save, calibration=STATISTICS)

    monkeypatch.setattr(mla_pass, "convert", convert)
    return made


def test_convert_with_defaults(calls: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("convert", "m.onnx", tmp_path / "out") == 0
    assert calls == [{"model": Path("m.onnx"), "config": MlaConfig(), "calibrate": "self", "calibration": None}]
    assert (tmp_path / "out").is_dir()
    out, err = capsys.readouterr()
    assert "cache bytes per token went from" in out
    assert err == "fold\n"


def test_convert_passes_every_option(calls: list[dict[str, Any]], tmp_path: Path) -> None:
    options = (
        "--rank 24 --rope-dims 8 --calibrate ids.npy --calibrate-tokens 1000 --rope-mode extend --absorb never "
        "--cache growing --max-positions 99 --partial --metric output --layers even --attention-flops 2 "
        "--finest-block 64 --cache-dtype int8 --rope-dtype bfloat16 --bundle"
    )
    assert run("convert", "m", tmp_path / "out", *options.split()) == 0
    expected = MlaConfig(
        rank=24,
        rope_dims=8,
        rope_mode="extend",
        absorb="never",
        cache="growing",
        calibrate_tokens=1000,
        max_positions=99,
        cache_dtype="int8",
        rope_dtype="bfloat16",
        partial=True,
        metric="output",
        layers="even",
        attention_flops=2.0,
        finest_block=64,
    )
    assert calls == [{"model": Path("m"), "config": expected, "calibrate": Path("ids.npy"), "calibration": None}]
    assert (tmp_path / "out" / "library").exists()


def test_a_largest_loss_stands_in_for_a_budget(
    calls: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("convert", "m", tmp_path / "out", "--max-loss", "0.05") == 0
    assert calls[0]["config"] == MlaConfig(max_loss=0.05)
    with pytest.raises(SystemExit) as stopped:
        run("convert", "m", tmp_path / "other", "--max-loss", "0.05", "--budget", "0.5")
    assert stopped.value.code == 2
    assert "--max-loss excludes --budget" in capsys.readouterr().err


def test_statistics_are_written_once_and_read_after(calls: list[dict[str, Any]], tmp_path: Path) -> None:
    stats = tmp_path / "stats.safetensors"
    assert run("convert", "m", tmp_path / "one", "--stats", stats) == 0
    written = stats.read_bytes()
    assert run("convert", "m", tmp_path / "two", "--stats", stats) == 0
    assert calls[0]["calibration"] is None
    assert calls[1]["calibration"].held_out.tolist() == STATISTICS.held_out.tolist()
    assert stats.read_bytes() == written


def test_a_file_that_holds_no_statistics_is_refused(
    calls: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stats = tmp_path / "stats.safetensors"
    stats.write_bytes(b"no such thing")
    assert run("convert", "m", tmp_path / "out", "--stats", stats) == 1
    assert "cannot read calibration statistics" in capsys.readouterr().err
    assert not calls and not (tmp_path / "out").exists()


def test_a_dry_run_writes_nothing(
    calls: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("convert", "m", tmp_path / "out", "--dry-run", "--json") == 0
    assert list(tmp_path.iterdir()) == []
    data = json.loads(capsys.readouterr().out)
    assert data["out"] is None
    assert data["report"]["layers"] == []
    assert run("convert", "m", tmp_path / "out", "--dry-run") == 0
    assert "would go from" in capsys.readouterr().out


# ---- the whole way, on a tiny random model


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, toy: Path) -> Path:
    """A random Llama of two layers with the toy's tokenizer, through `mla-pass export`."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("whole_way")
    checkpoint = folder / "checkpoint"
    transformers.LlamaForCausalLM(config).save_pretrained(checkpoint)
    (checkpoint / "tokenizer.json").write_bytes((toy / "tokenizer.json").read_bytes())
    assert run("export", checkpoint, folder / "original") == 0
    return folder / "original"


def test_explain_lists_every_block(capsys: pytest.CaptureFixture[str], exported: Path) -> None:
    assert run("explain", exported, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [(site["heads"], site["kv_groups"], site["head_dim"]) for site in found["sites"]] == [(4, 2, 16)] * 2
    assert found["refusals"] == []


def test_convert_then_verify_generate_and_measure(
    capsys: pytest.CaptureFixture[str], exported: Path, tmp_path: Path, text: Path
) -> None:
    latent = tmp_path / "latent"
    options = ("--budget", 1.0, "--calibrate-tokens", 1024, "--json")
    assert run("convert", exported, latent, *options) == 0
    report = json.loads(capsys.readouterr().out)["report"]
    assert [layer["cache_before"] for layer in report["layers"]] == [2 * 2 * 16 * 4] * 2

    assert run("verify", exported, latent, "--text", text, "--json", "--max-kl", 1e-6) == 0
    assert json.loads(capsys.readouterr().out)["top1"] == 1.0

    generated, losses = {}, {}
    for folder in (exported, latent):
        assert run("generate", folder, "--prompt", "w5 w6", "--prompt", "w7", "--max-new-tokens", 8, "--json") == 0
        generated[folder] = json.loads(capsys.readouterr().out)
        assert run("perplexity", folder, "--text", text, "--windows", 2, "--context", 64, "--json") == 0
        losses[folder] = json.loads(capsys.readouterr().out)["nll"]
    assert generated[exported]["token_ids"] == generated[latent]["token_ids"]
    assert generated[latent]["cache_bytes_per_token"] == report["totals"]["cache_after"]
    assert losses[latent] == pytest.approx(losses[exported], rel=1e-5)


def test_calibration_text_that_is_too_short_leaves_nothing(
    capsys: pytest.CaptureFixture[str], exported: Path, tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("w5 w6 w7")
    told = fails_with_one_sentence(capsys, "convert", exported, tmp_path / "out", "--calibrate", tmp_path / "short.txt")
    assert "token" in told
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


def test_a_rank_larger_than_the_full_size_is_refused(
    capsys: pytest.CaptureFixture[str], exported: Path, tmp_path: Path
) -> None:
    assert "rank" in fails_with_one_sentence(capsys, "convert", exported, tmp_path / "out", "--rank", 10_000)
    assert list(tmp_path.iterdir()) == []
