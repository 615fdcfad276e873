"""Generation and tokenizers: against a numpy oracle (tests/latent_toy.py) and, for a real export, against torch."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mla_pass.errors import MlaPassError
from mla_pass.onnx.generate import GenerateConfig, generate, generators, next_tokens
from mla_pass.onnx.session import ModelSession, session
from mla_pass.onnx.text import SpecialIds, TextStream, load_tokenizer, special_ids
from tests import families, latent_toy
from tests.latent_toy import BOS, EOS

WEIGHTS = latent_toy.weights(vocab=258, seed=2)
PROMPTS = [[65, 20, 33, 200, 7, 90, 11], [5, 6], [120, 99, 3, 4]]


@pytest.fixture(scope="module", params=["shared", "growing"])
def toy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelSession:
    folder = latent_toy.save(tmp_path_factory.mktemp("toy"), WEIGHTS, shared=request.param == "shared")
    assert latent_toy.save_tokenizer(folder) == 258
    return session(folder, threads=1)


@pytest.fixture
def bare(tmp_path: Path) -> ModelSession:
    """No tokenizer, no configuration."""
    return session(latent_toy.save(tmp_path, WEIGHTS), threads=1)


def greedy(prompt: list[int], new: int) -> tuple[int, ...]:
    tokens = list(prompt)
    for _ in range(new):
        tokens.append(int(latent_toy.reference(WEIGHTS, np.array(tokens))[-1].argmax()))
    return tuple(tokens[len(prompt) :])


class TestGreedy:
    @pytest.mark.parametrize("chunk", [None, 1, 3])
    def test_equals_the_oracle_for_every_row(self, toy: ModelSession, chunk: int | None) -> None:
        made = generate(toy, PROMPTS, GenerateConfig(max_new_tokens=12, prefill_chunk=chunk, stop_at_eos=False))
        assert made.token_ids == tuple(greedy(prompt, 12) for prompt in PROMPTS)
        assert len({made.token_ids[0][-4:], made.token_ids[1][-4:], made.token_ids[2][-4:]}) == 3  # rows do differ
        assert (made.prompt_tokens, made.new_tokens) == (13, 36)
        assert made.cache_bytes_per_token == toy.bytes_per_token == 32
        assert made.prefill_seconds > 0
        assert made.tokens_per_second == pytest.approx(33 / made.decode_seconds)

    def test_one_prompt_of_ids(self, toy: ModelSession) -> None:
        made = generate(toy, PROMPTS[0], GenerateConfig(max_new_tokens=1, stop_at_eos=False))
        assert made.token_ids == (greedy(PROMPTS[0], 1),)
        assert (made.decode_seconds, made.tokens_per_second) == (0.0, 0.0)

    def test_rows_stop_at_eos_one_by_one(self, toy: ModelSession) -> None:
        full = [greedy(prompt, 12) for prompt in PROMPTS]
        stop = full[1][3]
        expected = tuple(row[: row.index(stop) + 1] if stop in row else row for row in full)
        assert len(set(map(len, expected))) > 1
        config = toy.folder / "generation_config.json"
        before = config.read_text()
        config.write_text(json.dumps({"eos_token_id": [stop, 9999]}))
        try:
            made = generate(toy, PROMPTS, GenerateConfig(max_new_tokens=12))
            alone = generate(toy, PROMPTS[1], GenerateConfig(max_new_tokens=12))
        finally:
            config.write_text(before)
        assert made.token_ids == expected
        assert made.new_tokens == sum(map(len, expected))
        assert alone.token_ids == (expected[1],)

    def test_without_a_tokenizer(self, bare: ModelSession) -> None:
        made = generate(bare, PROMPTS, GenerateConfig(max_new_tokens=2))
        assert made.texts == ()
        assert made.token_ids == tuple(greedy(prompt, 2) for prompt in PROMPTS)
        with pytest.raises(MlaPassError, match="has no tokenizer"):
            generate(bare, "text")
        with pytest.raises(MlaPassError, match="has no tokenizer"):
            generate(bare, PROMPTS, on_token=lambda row, piece: None)


class TestAgainstTorch:
    @pytest.mark.parametrize("family", ["llama", "mistral"])  # mistral: a window, counted from each row's own start
    def test_greedy_equals_torch_with_padding(self, family: str) -> None:
        torch = pytest.importorskip("torch")
        model = families.FAMILIES[family]()
        opened = session(families.exported(family), threads=1)
        prompts = [[5, 9, 33, 4, 71, 8, 20, 6, 6, 12, 40], [60, 61], [50, 3, 17, 44]]
        config = GenerateConfig(max_new_tokens=20, stop_at_eos=False, prefill_chunk=3)
        made = generate(opened, prompts, config)
        for prompt, found in zip(prompts, made.token_ids, strict=True):  # torch sees each prompt alone, unpadded
            expected = list(prompt)
            for _ in range(20):  # every token from a full forward pass: no cache of any kind
                expected.append(int(model(torch.tensor([expected])).logits[0, -1].argmax()))
            assert found == tuple(expected[len(prompt) :])
        assert len({row[-5:] for row in made.token_ids}) == 3
        shape = model.config
        numbers = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim
        assert made.cache_bytes_per_token == numbers * 4


class TestText:
    def test_text_prompts_and_streams(self, toy: ModelSession) -> None:
        tokenizer = load_tokenizer(toy.folder)
        prompts = ["naïve", "日本"]
        pieces: list[list[str]] = [[], []]
        made = generate(
            toy,
            prompts,
            GenerateConfig(max_new_tokens=40, temperature=1.5, seed=3),
            on_token=lambda row, piece: pieces[row].append(piece),
        )
        assert made.prompt_tokens == 6 + 6  # bytes of UTF-8
        assert made.texts == tuple(tokenizer.decode(row) for row in made.token_ids)
        assert tuple("".join(row) for row in pieces) == made.texts
        assert min(map(len, pieces)) > 3  # it came in pieces

    def test_a_bos_is_added_where_the_tokenizer_adds_one(self, toy: ModelSession, tmp_path: Path) -> None:
        folder = latent_toy.save(tmp_path, WEIGHTS)
        latent_toy.save_tokenizer(folder, bos=True)
        text = "abc"
        ids = load_tokenizer(folder).encode(text)
        assert load_tokenizer(folder).encode(text, special=True) == [BOS, *ids]
        assert load_tokenizer(folder).leading_bos == BOS
        assert load_tokenizer(toy.folder).leading_bos is None
        config = GenerateConfig(max_new_tokens=6, stop_at_eos=False)
        assert generate(session(folder), text, config).token_ids == (greedy([BOS, *ids], 6),)
        assert generate(toy, text, config).token_ids == (greedy(ids, 6),)

    def test_stream_keeps_characters_whole(self, toy: ModelSession) -> None:
        tokenizer = load_tokenizer(toy.folder)
        text = "aé日🙂z"
        stream = TextStream(tokenizer)
        pieces = [stream.feed(token) for token in tokenizer.encode(text)]
        assert pieces == ["a", "", "é", "", "", "日", "", "", "", "🙂", "z"]
        assert stream.finish() == ""
        first_byte = tokenizer.encode("é")[0]
        assert stream.feed(first_byte) == ""
        assert stream.finish() == "\ufffd"

    def test_stream_of_a_tokenizer_that_strips_spaces(self) -> None:
        from tokenizers import Tokenizer as Fast
        from tokenizers import decoders, models

        fast = Fast(models.WordLevel({"▁Hello": 0, "▁big": 1, "▁world": 2}, unk_token="▁Hello"))
        fast.decoder = decoders.Metaspace()
        wrapped: Any = type("Wrapped", (), {"decode": staticmethod(lambda ids: fast.decode(list(ids)))})
        stream = TextStream(wrapped)
        assert [stream.feed(token) for token in (0, 1, 2, 2)] == ["Hello", " big", " world", " world"]


class TestSampling:
    LOGITS = np.log(np.array([0.05, 0.4, 0.05, 0.3, 0.2], np.float32))

    def draws(self, count: int = 20_000, **how: Any) -> np.ndarray:
        config, random = GenerateConfig(**how), generators(11, 1)
        picked = [next_tokens(self.LOGITS[None], config, random)[0] for _ in range(count)]
        return np.bincount(picked, minlength=5) / count

    @pytest.mark.parametrize(
        ("how", "expected"),
        [
            ({"temperature": 1.0}, [0.05, 0.4, 0.05, 0.3, 0.2]),
            ({"temperature": 0.5}, np.square([0.05, 0.4, 0.05, 0.3, 0.2]) / 0.295),
            ({"temperature": 1.0, "top_k": 2}, [0, 4 / 7, 0, 3 / 7, 0]),
            ({"temperature": 1.0, "top_k": 9}, [0.05, 0.4, 0.05, 0.3, 0.2]),
            ({"temperature": 1.0, "top_p": 0.69}, [0, 4 / 7, 0, 3 / 7, 0]),
            ({"temperature": 1.0, "top_p": 0.71}, [0, 4 / 9, 0, 3 / 9, 2 / 9]),
            ({"temperature": 1.0, "top_p": 1e-9}, [0, 1, 0, 0, 0]),
            ({"temperature": 1.0, "top_k": 3, "top_p": 0.5}, [0, 4 / 7, 0, 3 / 7, 0]),
            ({}, [0, 1, 0, 0, 0]),
        ],
    )
    def test_frequencies(self, how: dict[str, Any], expected: Any) -> None:
        found = self.draws(**how)
        np.testing.assert_allclose(found, expected, atol=5 * np.sqrt(0.25 / 20_000))
        assert (found[np.array(expected) == 0] == 0).all()

    def test_seeds(self, toy: ModelSession) -> None:
        def run(prompts: Any, seed: int) -> tuple[tuple[int, ...], ...]:
            config = GenerateConfig(max_new_tokens=10, temperature=1.0, seed=seed, stop_at_eos=False)
            return generate(toy, prompts, config).token_ids

        once = run(PROMPTS, 4)
        assert run(PROMPTS, 4) == once
        assert run(PROMPTS, 5) != once
        assert run(PROMPTS[:1], 4) == once[:1]  # a row's draws do not hang on the others
        assert len(set(run([PROMPTS[0]] * 3, 4))) == 3

    def test_nan(self) -> None:
        with pytest.raises(MlaPassError, match="not numbers"):
            next_tokens(np.full((1, 3), np.nan, np.float32), GenerateConfig(), generators(0, 1))


class TestBadInput:
    @pytest.mark.parametrize(
        "wrong",
        [
            {"max_new_tokens": 0}, {"temperature": -0.1}, {"temperature": float("nan")}, {"temperature": float("inf")},
            {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"seed": -1}, {"prefill_chunk": 0},
        ],
    )  # fmt: skip
    def test_config(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(MlaPassError, match=f"{next(iter(wrong))} is .*; expected"):
            GenerateConfig(**wrong)

    def test_prompts(self, toy: ModelSession) -> None:
        with pytest.raises(MlaPassError, match="no prompts"):
            generate(toy, [])
        for empty in ("", [[1], []]):
            with pytest.raises(MlaPassError, match=r"prompt \d has no tokens"):
                generate(toy, empty)
        with pytest.raises(MlaPassError, match="expected 0 to 257"):
            generate(toy, [[1], [300]])
        with pytest.raises(MlaPassError, match="need 4097 positions; the model has 4096"):
            generate(toy, [[1], [2, 3]], GenerateConfig(max_new_tokens=4096))


class TestTokenizerFiles:
    def test_bad_files(self, tmp_path: Path) -> None:
        with pytest.raises(MlaPassError, match="has no tokenizer"):
            load_tokenizer(tmp_path)
        for text in ("{", '{"model": {"type": "Unheard"}}'):
            (tmp_path / "tokenizer.json").write_text(text)
            with pytest.raises(MlaPassError, match="is no tokenizer that"):
                load_tokenizer(tmp_path)

    def test_sentencepiece_through_transformers(self, tmp_path: Path) -> None:
        sentencepiece = pytest.importorskip("sentencepiece")
        pytest.importorskip("transformers")
        corpus = tmp_path / "corpus.txt"
        corpus.write_text("the cat sat on the mat\n" * 50 + "a dog ran to the cat\n" * 50)
        sentencepiece.SentencePieceTrainer.train(
            input=str(corpus), model_prefix=str(tmp_path / "tokenizer"), vocab_size=40, model_type="bpe",
            bos_id=1, eos_id=2, unk_id=0, minloglevel=2,
        )  # fmt: skip
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "bos_token_id": 1, "eos_token_id": 2}))
        loaded = load_tokenizer(tmp_path)
        ids = loaded.encode("the cat sat")
        assert 1 not in ids
        assert loaded.decode([*ids, 2]) == "the cat sat"
        assert (loaded.bos, loaded.eos) == (1, (2,))

    @pytest.mark.parametrize(
        ("generation", "config", "expected"),
        [
            (None, None, SpecialIds(None, ())),
            ({"eos_token_id": [4, 5]}, {"bos_token_id": 1, "eos_token_id": 2}, SpecialIds(1, (4, 5))),
            ({"eos_token_id": None}, {"bos_token_id": 0, "eos_token_id": 0}, SpecialIds(0, (0,))),
            ({}, {"text_config": {"bos_token_id": 2, "eos_token_id": 1}}, SpecialIds(2, (1,))),
        ],
    )
    def test_special_ids(self, tmp_path: Path, generation: Any, config: Any, expected: SpecialIds) -> None:
        for name, content in (("generation_config.json", generation), ("config.json", config)):
            if content is not None:
                (tmp_path / name).write_text(json.dumps(content))
        assert special_ids(tmp_path) == expected

    @pytest.mark.parametrize(
        ("text", "told"), [("{", "not valid JSON"), ("[]", "holds a list"), ('{"eos_token_id": "x"}', "no token id")]
    )
    def test_bad_special_ids(self, tmp_path: Path, text: str, told: str) -> None:
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(MlaPassError, match=told):
            special_ids(tmp_path)

    def test_special_tokens_are_left_out_of_text(self, toy: ModelSession) -> None:
        tokenizer = load_tokenizer(toy.folder)
        assert tokenizer.decode([BOS, *tokenizer.encode("hi"), EOS]) == "hi"
        assert (tokenizer.bos, tokenizer.eos) == (BOS, (EOS,))
