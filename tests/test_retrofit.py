"""The guide's commands and its Python function, on tiny models of the families it names.

A tiny model has the key/value heads of the model it stands for, each a sixteenth as long; so the guide's --head-dim is
divided by 16 as well, and what fits or does not fit is the same as in the full size. Everything else of a command line
is run as it is written.
"""

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mla_pass.config import MlaConfig
from mla_pass.errors import MlaPassError
from mla_retrofit import api, convert_to_mla
from mla_retrofit.cli import main
from mla_retrofit.compare import compare
from mla_retrofit.request import Request
from mla_retrofit.sizes import Shape, conversion_config, read_shape
from tests import families

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("onnxscript")

import mla_pass.pytorch.modeling  # noqa: E402, F401  registers the format
from mla_pass.export.hf import export_hf  # noqa: E402
from mla_pass.onnx.session import session  # noqa: E402

GUIDE = Path(__file__).parents[1] / "docs" / "guide.md"
SCALE = 16
QUICK = ("--calibrate-tokens", "512")
WORDS = ("<unk>", "<s>", "</s>", *(f"w{number}" for number in range(3, families.VOCAB)))
# Name on the command line: model type, query heads, key/value heads, head size / 16, further configuration.
MODELS: dict[str, tuple[str, int, int, int, dict[str, Any]]] = {
    "meta-llama/Llama-3-8B": ("llama", 16, 8, 8, {}),
    "Qwen/Qwen2.5-7B": ("qwen2", 8, 4, 8, {}),
    "mistralai/Mistral-7B-v0.1": ("mistral", 16, 8, 8, {"sliding_window": 8}),
    "mistralai/Mixtral-8x7B-v0.1": (
        "mixtral", 16, 8, 8, {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "google/gemma-7b": ("gemma", 16, 16, 16, {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True}),
    "microsoft/phi-3": ("phi3", 32, 32, 6, {"sliding_window": None}),
}  # fmt: skip
# The guide's sizes, and whether a row of that latent and the rotated numbers beside it is narrower than 2 x G x D.
ASKED = {
    "meta-llama/Llama-3-8B": (4, 256, True),
    "Qwen/Qwen2.5-7B": (4, 256, False),
    "mistralai/Mistral-7B-v0.1": (4, 128, True),
    "mistralai/Mixtral-8x7B-v0.1": (16, 128, False),
    "google/gemma-7b": (4, 256, True),
    "microsoft/phi-3": (16, 64, True),
}


def saved(model: Any, folder: Path) -> Path:
    """A checkpoint with a tokenizer of as many words."""
    model.save_pretrained(folder)
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def tiny(name: str, folder: Path) -> Path:
    """The stand-in of a model of the guide, saved under its name."""
    kind, heads, groups, size, others = MODELS[name]
    if not (folder / name).exists():
        hidden = heads * size if kind == "phi3" else 64
        sizes = {"num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": size, "hidden_size": hidden}
        saved(families._build(kind, num_hidden_layers=1, **sizes, **others), folder / name)
    return folder / name


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the guide's model names are folders, made as they are needed."""
    return tmp_path_factory.mktemp("hub")


@pytest.fixture
def at(hub: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That folder, to work in; a model in it is exported once, not for every conversion."""

    def export(source: Path, out: Path) -> Path:
        once = hub / "exported" / Path(source).absolute().relative_to(hub)
        return once if once.exists() else export_hf(source, once)

    monkeypatch.setattr("mla_pass.pytorch.convert.export_hf", export)
    monkeypatch.chdir(hub)
    return hub


def llama(at: Path) -> Path:
    return tiny("meta-llama/Llama-3-8B", at)


def logits(model: Any, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.double().numpy()


def some_ids(rows: int = 2, length: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(3, families.VOCAB, (rows, length))


def loaded(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def fails_with_one_sentence(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 1
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("mla-retrofit: ")]
    assert out == "" and "Traceback" not in err and len(lines) == 1, err
    return lines[0]


# ---- the command lines of the guide


def commands() -> list[list[str]]:
    """Every command line of docs/guide.md that converts a model it names."""
    blocks = re.findall(r"```sh\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    lines = [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [words[1:] for words in lines if words[:1] == ["mla-retrofit"] and option(words, "--model") in MODELS]


def scaled(words: list[str]) -> list[str]:
    """With --head-dim as the tiny models have it."""
    words = list(words)
    if "--head-dim" in words:
        at = words.index("--head-dim") + 1
        words[at] = str(int(words[at]) // SCALE)
    return words


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_the_guide_documents_every_family_with_its_own_sizes() -> None:
    named = {option(words, "--model") for words in commands()}
    assert named == set(MODELS)
    for name, (heads, size, fits) in ASKED.items():
        given = [
            (option(words, "--num-kv-heads"), option(words, "--head-dim"))
            for words in commands() if option(words, "--model") == name and "--num-kv-heads" in words
        ]  # fmt: skip
        assert ((str(heads), str(size)) in given) is fits, name


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_command_line_of_our_guide(words: list[str], at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny(option(words, "--model"), at)
    out = Path(option(words, "--output-dir"))
    assert main([*scaled(words), *QUICK]) == 0
    shown = capsys.readouterr().out
    assert "cache bytes per token went from" in shown
    model = loaded(out)
    (block,) = model.latent_blocks
    if "--num-kv-heads" in words:
        assert block.spec.rank == int(option(words, "--num-kv-heads")) * int(option(words, "--head-dim")) // SCALE
    folded = not (block.query_map or block.key_up or block.value_up)
    assert folded is ("--absorb" in words)
    full = read_shape(transformers.AutoConfig.from_pretrained(folder), "").width
    assert block.spec.rank + block.spec.rope_dim < full
    original = logits(loaded(folder), some_ids())
    assert np.abs(logits(model, some_ids()) - original).mean() < np.abs(original - original.mean()).mean()


@pytest.mark.parametrize("name", [name for name, (*_, fits) in ASKED.items() if not fits])
def test_sizes_of_the_guide_that_do_not_fit(name: str, at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny(name, at)
    heads, size, _ = ASKED[name]
    told = fails_with_one_sentence(
        capsys, "--model", name, "--output-dir", "no", "--num-kv-heads", heads, "--head-dim", size // SCALE,
        "--rope-mode", "extend", "--absorb",
    )  # fmt: skip
    assert f"num_kv_heads {heads} x head_dim {size // SCALE} asks for a latent of {heads * size // SCALE}" in told
    assert name in told and "would save" in told
    assert not Path("no").exists()


# ---- the Python function


def test_the_function_of_the_guide_and_folders_it_saves(at: Path) -> None:
    tiny("Qwen/Qwen2.5-7B", at)
    with pytest.raises(MlaPassError, match="at most 60 fit, and num_kv_heads 4 and head_dim 8, 32 numbers"):
        convert_to_mla(model_name_or_path="Qwen/Qwen2.5-7B", num_kv_heads=4, head_dim=256 // SCALE, rope_mode="extend",
                       absorb=True, flash_attn=False, return_model=True)  # fmt: skip
    found = convert_to_mla(model_name_or_path="Qwen/Qwen2.5-7B", num_kv_heads=4, head_dim=128 // SCALE,
                           rope_mode="extend", absorb=True, flash_attn=False, return_model=True,
                           calibrate_tokens=512)  # fmt: skip
    assert found is not None
    model, tokenizer = found
    model.save_pretrained("./qwen-7b-saved")
    tokenizer.save_pretrained("./qwen-7b-saved")
    again = loaded(Path("qwen-7b-saved"))
    np.testing.assert_array_equal(logits(again, some_ids()), logits(model, some_ids()))
    same = transformers.AutoTokenizer.from_pretrained("qwen-7b-saved")
    assert same.get_vocab() == tokenizer.get_vocab()
    cache = again(torch.from_numpy(some_ids()), use_cache=True).past_key_values
    kept = sum(x.untyped_storage().nbytes() for layer in cache.layers for x in (layer.keys, layer.values))
    assert kept <= 2 * 40 * 4 * (32 + 4) * 1.05  # float32 latents and rotated parts of two rows of 40 tokens


def test_repeat_at_the_models_own_sizes_is_exact(at: Path) -> None:
    folder = llama(at)
    found = convert_to_mla(folder, rope_mode="repeat", calibrate_tokens=512)
    assert found is not None
    theirs = logits(loaded(folder), some_ids())
    assert np.abs(logits(found[0], some_ids()) - theirs).max() < 2e-4 * np.abs(theirs).max()


def test_without_a_wish_nothing_is_returned_and_both_formats_agree(at: Path) -> None:
    folder = llama(at)
    nothing = convert_to_mla(folder, return_model=False, output_dir="both", format="both", budget=0.6,
                             calibrate_tokens=512)  # fmt: skip
    assert nothing is None
    ids = some_ids()
    np.testing.assert_allclose(logits(loaded(Path("both")), ids), session(Path("both/onnx")).logits(ids), atol=2e-4)
    recorded = json.loads(Path("both/mla_pass.json").read_text())["config"]
    assert recorded["budget"] == 0.6 and recorded["rope_mode"] == "block" and recorded["absorb"] == "auto"


# ---- --test


def test_both_models_write_and_their_logits_are_compared(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = llama(at)
    arguments = ("--model", str(folder), "--output-dir", "tested", "--test", "--test-prompt", "w5 w6 w7", *QUICK)
    assert main(list(arguments)) == 0
    shown = capsys.readouterr().out
    original, converted = loaded(folder), loaded(Path("tested"))
    rows = [
        model.generate(torch.tensor([[5, 6, 7]]), do_sample=False, max_new_tokens=64, pad_token_id=2)[0].tolist()
        for model in (original, converted)
    ]
    for title, row in zip(("The original writes:", "The converted model writes:"), rows, strict=True):
        assert f"{title}\n{' '.join(WORDS[i] for i in row if i > 2)}\n" in shown
    assert f"tokens compared          {len(rows[0])}\n" in shown and shown.endswith("written to tested\n")


def test_numbers_of_a_comparison(at: Path) -> None:
    original, other = families.FAMILIES["llama"](), families._build("llama", seed=1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama(at))
    told = compare(original, other, tokenizer, prompt="w5 w6 w7", new_tokens=20)
    ids = original.generate(torch.tensor([[5, 6, 7]]), do_sample=False, max_new_tokens=20, pad_token_id=2).numpy()
    a, b = (logits(model, ids)[0] for model in (original, other))
    p, q = log_softmax(a), log_softmax(b)
    assert told.agreement.tokens == ids.shape[1]
    assert told.agreement.kl == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), rel=1e-4)
    assert told.agreement.top1 == (p.argmax(-1) == q.argmax(-1)).mean()
    assert told.agreement.largest_difference == pytest.approx(np.abs(a - b).max(), rel=1e-4)
    with pytest.raises(MlaPassError, match="a prompt of 300 tokens cannot be continued within 256"):
        compare(original, other, tokenizer, prompt="w5 " * 300)


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)


# ---- bad input


def test_a_missing_model_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no/such/model" in fails_with_one_sentence(capsys, "--model", "no/such/model")
    assert list(tmp_path.iterdir()) == []


def test_a_taken_output_folder_is_told_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "keep.txt").write_text("mine")
    told = fails_with_one_sentence(capsys, "--model", "no/such/model", "--output-dir", tmp_path)
    assert str(tmp_path) in told
    assert [path.name for path in tmp_path.iterdir()] == ["keep.txt"]


def test_a_conversion_that_fails_leaves_nothing(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, text = llama(at), at / "short.txt"
    text.write_text("w5 w6 w7")
    told = fails_with_one_sentence(capsys, "--model", folder, "--output-dir", "short", "--calibrate", text, *QUICK)
    assert "short.txt" in told
    assert not list(at.glob("*short*/")) and not list(at.glob(".short*"))


def test_both_formats_are_written_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mla_pass.pytorch.convert import TorchResult

    class NoRoom:
        def save(self, out: Path, *, bundle: bool) -> None:
            raise MlaPassError("no room")

    def write(result: TorchResult, folder: Path) -> None:
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(TorchResult, "write", write)
    half: Any = NoRoom()
    place: Any = None
    result = TorchResult(tmp_path, half, (), "float32", place)
    with pytest.raises(MlaPassError, match="no room"):
        result.save(tmp_path / "out", format="both")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(MlaPassError, match="format must be one of hf, onnx, both"):
        result.save(tmp_path / "out", format="gguf")


def test_a_model_without_a_tokenizer_cannot_be_tested(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = at / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((llama(at) / "config.json").read_text())
    assert "holds no tokenizer" in fails_with_one_sentence(capsys, "--model", bare, "--output-dir", "no", "--test")


def test_flash_attention_says_what_is_missing(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = fails_with_one_sentence(capsys, "--model", llama(at), "--output-dir", "no", "--flash-attn")
    for lacking, there in (("flash-attn", False), ("CUDA device", torch.cuda.is_available()), ("16 bits", False)):
        assert (lacking in told) is not there
    assert not Path("no").exists()


def test_flash_attention_is_what_the_model_is_loaded_with(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained",
        lambda folder, **options: asked.update(options) or torch.nn.Identity(),
    )  # fmt: skip
    for flash, expected in ((True, "flash_attention_2"), (False, None)):
        asked.clear()
        result: Any = SimpleNamespace(dtype="float16")
        api.Retrofitted(Request("m", flash_attn=flash), Path("m"), result).model(Path("m"))
        assert asked.get("attn_implementation") == expected and asked["dtype"] == "float16"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--format", "onnx", "--dtype", "float16"), "mla-pass export --dtype float16"),
        (("--num-kv-heads", "0"), "must be at least 1; got 0 and 8"),
        (("--budget", "1.5"), r"budget must lie in (0, 1]"),
    ],
)
def test_what_cannot_be(arguments: tuple[str, ...], told: str, at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert told in fails_with_one_sentence(capsys, "--model", llama(at), "--output-dir", "no", *arguments)
    assert not Path("no").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--model", "m", "--rope-mode", "block"),
        ("--model", "m", "--budget", "0.5", "--num-kv-heads", "4"),
        ("--model", "m", "--format", "gguf"),
    ],
)
def test_wrong_arguments_exit_with_2(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("usage: ")


# ---- sizes

LLAMA_3_8B = Shape("LLaMA-3-8B", 32, 8, 128, 128)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({}, MlaConfig(budget=0.5)),
        ({"budget": 0.3, "absorb": True}, MlaConfig(budget=0.3, absorb="always")),
        ({"rope_mode": "extend"}, MlaConfig(budget=0.5, rope_mode="extend")),
        ({"num_kv_heads": 4, "head_dim": 256}, MlaConfig(rank=1024, rope_dims=128)),
        ({"num_kv_heads": 4}, MlaConfig(rank=512, rope_dims=128)),
        ({"head_dim": 64}, MlaConfig(rank=512, rope_dims=128)),
        ({"rope_mode": "repeat"}, MlaConfig(rank=1024, rope_dims=1024, rope_mode="repeat")),
        ({"rope_mode": "repeat", "budget": 0.75}, MlaConfig(budget=0.75, rope_mode="repeat")),
        ({"num_kv_heads": 15, "head_dim": 128}, MlaConfig(rank=1920, rope_dims=128)),  # the widest
        ({"head_dim": 9, "calibrate_tokens": 999}, MlaConfig(rank=72, rope_dims=128, calibrate_tokens=999)),
    ],
)  # fmt: skip
def test_words_as_a_configuration(words: dict[str, Any], expected: MlaConfig) -> None:
    assert conversion_config(LLAMA_3_8B, **words) == expected


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            {"num_kv_heads": 1, "head_dim": 1921},
            "at most 1,920 fit, and num_kv_heads 1 and head_dim 1024, 1,024 numbers, would save 44%",
        ),
        (
            {"num_kv_heads": 9, "head_dim": 128, "rope_mode": "repeat"},
            "at most 1,024 fit, and 512 numbers, would save 25%",
        ),
        ({"rope_mode": "block"}, "rope_mode must be one of extend, repeat, or not be given; got 'block'"),
        ({"num_kv_heads": 4, "budget": 0.5}, "give one of them"),
    ],
)  # fmt: skip
def test_words_that_cannot_be_served(words: dict[str, Any], told: str) -> None:
    with pytest.raises(MlaPassError, match=re.escape(told)):
        conversion_config(LLAMA_3_8B, **words)


def test_a_shape_is_what_a_cache_of_the_model_holds() -> None:
    for name in ("llama", "llama_mqa", "qwen3", "phi3", "gemma3"):
        model = families.FAMILIES[name]()
        cache = model(torch.ones(1, 7, dtype=torch.int64), use_cache=True).past_key_values
        shape = read_shape(model.config, name)
        assert shape.layers == len(cache.layers)
        assert 7 * shape.width == cache.layers[0].keys.numel() + cache.layers[0].values.numel()
    assert read_shape(families.FAMILIES["phi3_partial"]().config, "").rotary_dim == families.SHAPE["head_dim"] // 2
