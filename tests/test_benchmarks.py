"""The measuring side of the benchmarks: prompts, buckets, and what the figure is drawn from."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import longcontext, plot
from mla_pass.errors import MlaPassError
from mla_pass.onnx.session import session
from mla_pass.onnx.text import Tokenizer
from tests import latent_toy

BYTES = Tokenizer(lambda text, _: list(text.encode()), lambda ids: bytes(ids).decode(), None, ())
FILLER = np.full(3000, ord("~"))


class TestPrompt:
    @pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
    def test_needle_lies_where_asked_in_a_prompt_of_the_length_asked(self, depth: float) -> None:
        made = longcontext.prompt(BYTES, FILLER, 1000, depth, "12345")
        assert len(made.ids) + len(made.answer) == 1000
        text = bytes(made.ids.tolist()).decode()
        assert bytes(made.answer.tolist()) == b" 12345" and text.endswith("The pass key is")
        before, after = text.split(longcontext.NEEDLE.format(key="12345"))
        assert before.count("~") == round(depth * text.count("~")) and before.startswith(longcontext.OPENING)
        assert after.endswith(longcontext.QUESTION)

    @pytest.mark.parametrize("length", [50, 5000])
    def test_lengths_without_room_or_filler_are_refused(self, length: int) -> None:
        with pytest.raises(MlaPassError, match=f"a prompt of {length} tokens"):
            longcontext.prompt(BYTES, FILLER, length, 0.5, "12345")


class TestMeasures:
    def test_buckets_hold_the_positions_they_name(self) -> None:
        losses = np.zeros((2, 3, 2047))
        losses[0] = np.arange(1, 2048)  # the loss of the token at each position is its position
        losses[1] = losses[0] + np.array([1.0, 2.0, 3.0])[:, None]
        names = ["original", "converted"]
        original, converted = longcontext._buckets(names, losses, 1024, 2048)
        assert (original.model, converted.model) == ("original", "converted")
        assert original.loss == (1024 + 2047) / 2 and original.excess == 0
        assert converted.excess == pytest.approx(2.0) and converted.stderr == pytest.approx(1 / 3**0.5)
        assert longcontext._buckets(names, losses, 0, 1024)[0].loss == (1 + 1023) / 2
        assert longcontext._buckets(names, losses[:, :1], 0, 1024)[1].stderr is None

    def test_an_answer_against_all_logits_at_once(self, tmp_path: Path) -> None:
        weights = latent_toy.weights(vocab=31, seed=4)
        model = session(latent_toy.save(tmp_path, weights, shared=True), threads=1)
        ids = np.random.default_rng(0).integers(0, 31, 20)
        greedy = list(ids)
        for _ in range(3):
            greedy.append(int(latent_toy.reference(weights, np.array(greedy))[-1].argmax()))
        wrong = [*greedy[:-1], (greedy[-1] + 1) % 31]
        for tokens, expected in ((greedy, True), (wrong, False)):
            found, logprob = longcontext.ask(model, longcontext.Prompt(ids, np.array(tokens[20:])))
            logits = latent_toy.reference(weights, np.array(tokens))[19:-1]
            logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            assert found is expected
            assert logprob == pytest.approx(logs[range(3), tokens[20:]].sum(), abs=1e-4)


class TestPlot:
    @staticmethod
    def file(folder: Path, rows: object) -> Path:
        path = folder / "rows.json"
        path.write_text(json.dumps(rows))
        return path

    def test_curves_by_method_and_size(self, tmp_path: Path) -> None:
        row = {"model": "x", "stderr": None}
        rows = [
            {"model": "original", "cache_bytes_per_token": 100, "excess": 0.0},
            {**row, "cache_bytes_per_token": 75, "excess": 0.1},
            {**row, "cache_bytes_per_token": 50, "excess": 0.2, "stderr": 0.01},
            {**row, "cache_bytes_per_token": 50, "excess": 0.4, "method": "svd"},
            {**row, "cache_bytes_per_token": 25, "excess": 0.3, "method": "mla_pass int8"},
            {**row, "cache_bytes_per_token": 50, "excess": 0.3, "method": "ablation"},
            {**row, "cache_bytes_per_token": 100, "excess": 0.0},
        ]
        curves = plot.read(self.file(tmp_path, rows))
        ours = [plot.Point(50, 0.2, 0.01), plot.Point(75, 0.1, 0.0)]
        others = {"svd": [plot.Point(50, 0.4, 0.0)], "mla_pass int8": [plot.Point(25, 0.3, 0.0)]}
        assert curves == plot.Curves({plot.OURS: ours, **others}, 100)

    @pytest.mark.parametrize("rows", [{}, [{"model": "x"}], [1]])
    def test_other_files_are_refused(self, tmp_path: Path, rows: object) -> None:
        with pytest.raises(MlaPassError, match="is no list of rows"):
            plot.read(self.file(tmp_path, rows))

    def test_without_matplotlib_one_sentence(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(MlaPassError, match="pip install matplotlib"):
            plot.draw(plot.Curves({}, None), tmp_path / "x.svg", "")
