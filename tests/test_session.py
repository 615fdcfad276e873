"""Opening models and decoding with a cache, against a numpy oracle (tests/latent_toy.py)."""

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from mla_pass import native
from mla_pass.errors import MlaPassError
from mla_pass.onnx.ports import read_ports
from mla_pass.onnx.session import CPU, CUDA, Decoder, ModelSession, computes_in, host_view, session
from tests import latent_toy
from tests.native_cases import Case, Drawn, needs_library

WEIGHTS = latent_toy.weights()
VOCAB = len(WEIGHTS.embed)
TOKENS = np.random.default_rng(5).integers(0, VOCAB, (3, 12))
EXPECTED = np.stack([latent_toy.reference(WEIGHTS, row) for row in TOKENS])
SCALE = np.abs(EXPECTED).max()


@pytest.fixture(scope="module", params=["shared", "growing"])
def toy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelSession:
    folder = latent_toy.save(tmp_path_factory.mktemp("toy"), WEIGHTS, shared=request.param == "shared")
    return session(folder, threads=1)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> ModelSession:
    return session(latent_toy.save(tmp_path_factory.mktemp("shared"), WEIGHTS), threads=1)


def assert_close(found: np.ndarray, expected: np.ndarray, epsilon: float = float(np.finfo(np.float32).eps)) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=16 * epsilon * SCALE)


def small_model(folder: Path, dtype: int, op: str = "Identity") -> Path:
    """logits = op(table[input_ids]) of an element type, without a cache."""
    table = numpy_helper.from_array(np.arange(20, dtype=np.float32).reshape(5, 4) / 8, "table")
    nodes = [
        helper.make_node("Cast", ["table"], ["typed"], to=dtype),
        helper.make_node("Gather", ["typed", "input_ids"], ["rows"]),
        helper.make_node(op, ["rows"], ["logits"]),
    ]
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])
    logits = helper.make_tensor_value_info("logits", dtype, ["batch", "sequence", 4])
    graph = helper.make_graph(nodes, "small", [ids], [logits], [table])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    onnx.save(model, folder / "model.onnx")
    return folder


class TestReading:
    def test_the_graph_tells_the_cache(self, toy: ModelSession) -> None:
        kind = "shared" if toy.ort.get_inputs()[3].shape[2] == "capacity" else "growing"
        assert [(t.past, t.present, t.heads, t.width, t.kind) for t in toy.cache.tensors] == [
            ("past.0.latent", "present.0.latent", 1, 6, kind),
            ("past.0.rope", "present.0.rope", 1, 2, kind),
        ]
        assert toy.bytes_per_token == (6 + 2) * 4
        assert (toy.vocab, toy.max_position) == (VOCAB, 4096)

    @pytest.mark.parametrize(
        ("cache_type", "epsilon"), [(TensorProto.FLOAT16, 2.0**-11), (TensorProto.BFLOAT16, 2.0**-8)]
    )
    @pytest.mark.parametrize("shared", [True, False])
    def test_half_precision_caches(self, tmp_path: Path, cache_type: int, epsilon: float, shared: bool) -> None:
        opened = session(latent_toy.save(tmp_path, WEIGHTS, cache_type, shared), threads=1)
        assert opened.bytes_per_token == (6 + 2) * 2
        decoder = Decoder(opened, 3, 12)
        found = np.concatenate([decoder.forward(TOKENS[:, :7]), decoder.forward(TOKENS[:, 7:])], axis=1)
        assert_close(found, EXPECTED, epsilon)
        assert decoder.cache_bytes_per_token() == 16
        with pytest.raises(AssertionError):  # rounded rows leave a trace: the cache is what it says
            assert_close(found, EXPECTED)

    @pytest.mark.parametrize("dtype", [TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE])
    def test_logits_of_any_float_come_as_float32(self, tmp_path: Path, dtype: int) -> None:
        opened = session(small_model(tmp_path, dtype))
        found = opened.logits([0, 3])
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, np.arange(20).reshape(1, 5, 4)[:, [0, 3]] / 8)

    def test_pairs_by_name_before_order(self) -> None:
        ids = SimpleNamespace(name="input_ids", type="tensor(int64)", shape=["b", "s"])
        logits = SimpleNamespace(name="logits", type="tensor(float)", shape=["b", "s", 9])

        def port(name: str, rows: str, heads: int = 2) -> SimpleNamespace:
            return SimpleNamespace(name=name, type="tensor(float)", shape=["b", heads, rows, 4])

        pasts = [port("past_key_values.0.key", "p"), port("past_key_values.0.value", "p2")]
        crossed = [port("present.0.value", "t"), port("present.0.key", "t2")]
        cache, _, _ = read_ports([ids, *pasts], [*crossed, logits])
        assert [(t.past, t.present) for t in cache.tensors] == [
            ("past_key_values.0.key", "present.0.key"), ("past_key_values.0.value", "present.0.value"),
        ]  # fmt: skip
        cache, _, _ = read_ports([ids, *pasts], [logits, port("k_out", "t"), port("v_out", "t")])
        assert [t.present for t in cache.tensors] == ["k_out", "v_out"]
        with pytest.raises(MlaPassError, match="2 cache inputs and 1 cache outputs"):
            read_ports([ids, *pasts], [logits, port("k_out", "t")])
        with pytest.raises(MlaPassError, match="expected equal types, heads and widths"):
            read_ports([ids, *pasts], [logits, port("k_out", "t"), port("v_out", "t", heads=3)])
        with pytest.raises(MlaPassError, match="beside the cache"):
            read_ports([ids, *pasts], crossed)
        with pytest.raises(MlaPassError, match="graph input seqlens"):
            read_ports([ids, SimpleNamespace(name="seqlens", type="tensor(int32)", shape=["b"])], [logits])
        with pytest.raises(MlaPassError, match="dynamic number of rows"):
            read_ports([ids, SimpleNamespace(name="k", type="tensor(float)", shape=[1, 2, 7, 4])], [logits, crossed[0]])


class TestBadModels:
    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(MlaPassError, match="does not exist; expected a model folder"):
            session(tmp_path)

    def test_not_onnx(self, tmp_path: Path) -> None:
        (tmp_path / "model.onnx").write_text("hello, I am no protobuf")
        with pytest.raises(MlaPassError, match="expected an ONNX model"):
            session(tmp_path)

    @pytest.mark.parametrize("keep", [None, 100])
    def test_weights_missing_or_cut(self, tmp_path: Path, keep: int | None) -> None:
        path = latent_toy.save(tmp_path, WEIGHTS) / "model.onnx"
        onnx.save(
            onnx.load(path), path, save_as_external_data=True, location="model.onnx.data", size_threshold=64
        )
        data = tmp_path / "model.onnx.data"
        assert session(tmp_path).logits([[1]]).shape == (1, 1, VOCAB)
        whole = data.read_bytes()
        data.unlink() if keep is None else data.write_bytes(whole[:keep])
        with pytest.raises(MlaPassError, match=r"model\.onnx"):
            session(tmp_path)

    def test_no_kernel_for_the_type(self, tmp_path: Path) -> None:
        with pytest.raises(MlaPassError, match="no kernel for that operator in .*: export the model as float32"):
            session(small_model(tmp_path, TensorProto.BFLOAT16, "Sigmoid"))

    def test_provider_not_offered(self, shared: ModelSession) -> None:
        with pytest.raises(MlaPassError, match=r"NoSuchExecutionProvider.*offers"):
            session(shared.path, providers=["NoSuchExecutionProvider"])

    def test_threads(self, shared: ModelSession) -> None:
        with pytest.raises(MlaPassError, match="threads is 0"):
            session(shared.path, threads=0)

    def test_no_onnxruntime(self, shared: ModelSession, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        with pytest.raises(MlaPassError, match=r"mla-pass\[cpu\]"):
            session(shared.path)


class TestCuda:
    """What can be told of a provider that is not there: which of the two ways its LatentAttention nodes would go."""

    @pytest.fixture(autouse=True)
    def offered(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])

    @staticmethod
    def opened(folder: Path, dtype: str, fused: bool | None) -> ModelSession:
        path = folder / "model.onnx"
        onnx.save(Drawn(Case(dtype=dtype)).model(), path)
        return session(path, providers=[CUDA], fused=fused)

    @needs_library
    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    def test_the_library_is_registered_where_it_has_kernels(
        self, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        registered: list[str] = []

        def register(options: object, path: str) -> None:
            registered.append(path)

        def make(path: str, options: object, providers: list[str]) -> None:
            assert providers == [CUDA]
            raise Opened

        monkeypatch.setattr(onnxruntime.SessionOptions, "register_custom_ops_library", register)
        monkeypatch.setattr(onnxruntime, "InferenceSession", make)
        for built in ((), ("8.0",)):
            monkeypatch.setattr(native, "cuda_capabilities", lambda built=built: built)
            for fused in (None, False):
                with pytest.raises(Opened):
                    self.opened(tmp_path, dtype, fused)
        assert registered == ([] if dtype == "float32" else [native.library_path()])

    @needs_library
    def test_asking_for_what_there_is_not(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(native, "cuda_capabilities", lambda: ("8.0",))
        told = r"computes attention in float32; expected float16 or bfloat16 for CUDA kernels, or fused=False"
        with pytest.raises(MlaPassError, match=told):
            self.opened(tmp_path, "float32", True)
        monkeypatch.setattr(native, "cuda_capabilities", lambda: ())
        with pytest.raises(MlaPassError, match=r"built without CUDA kernels; expected .*nvcc.*, or fused=False"):
            self.opened(tmp_path, "float16", True)
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["OtherExecutionProvider"])
        with pytest.raises(MlaPassError, match=r"no kernel for OtherExecutionProvider; expected CPU.* or CUDA"):
            session(tmp_path, providers=["OtherExecutionProvider"], fused=True)

    @pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")
    def test_a_provider_that_does_not_start(self, shared: ModelSession, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(native, "find_library", lambda: None)
        told = r"could not start \['CUDAExecutionProvider'\] and fell back to \['CPUExecutionProvider'\]; check"
        with pytest.raises(MlaPassError, match=told):
            session(shared.path, providers=[CUDA])

    def test_what_a_model_computes_in_is_read_off_its_graph(self, tmp_path: Path) -> None:
        def value(name: str, kind: int) -> onnx.ValueInfoProto:
            return helper.make_tensor_value_info(name, kind, [1])

        weight = numpy_helper.from_array(np.ones((1, 1), np.float16), "weight")
        nodes = [
            helper.make_node("Gather", ["weight", "ids"], ["embedded"]),
            helper.make_node("Cast", ["embedded"], ["wide"], to=TensorProto.FLOAT),
            helper.make_node("LatentAttention", ["wide"], ["a"], domain="mla_pass"),
            helper.make_node("MatMul", ["embedded", "weight"], ["query"]),
            helper.make_node("LatentAttention", ["query"], ["b"], domain="mla_pass"),
        ]
        for kept, want in ((3, {"float32"}), (5, {"float32", "float16"}), (2, set())):
            graph = helper.make_graph(nodes[:kept], "g", [value("ids", TensorProto.INT64)], [], [weight])
            onnx.save(helper.make_model(graph), tmp_path / "model.onnx")
            assert computes_in(tmp_path / "model.onnx") == want


class Opened(Exception):
    """Raised where a session would be made."""


class TestDecoder:
    def test_cacheless(self, toy: ModelSession) -> None:
        assert_close(toy.logits(TOKENS), EXPECTED)
        assert_close(toy.logits(TOKENS[1].tolist()), EXPECTED[1:2])

    @pytest.mark.parametrize("sizes", [[12], [1] * 12, [5, 1, 4, 2]])
    def test_pieces_equal_the_whole(self, toy: ModelSession, sizes: list[int]) -> None:
        decoder = Decoder(toy, 3, 20)
        parts = [decoder.forward(piece) for piece in np.split(TOKENS, np.cumsum(sizes)[:-1], axis=1)]
        assert_close(np.concatenate(parts, axis=1), EXPECTED)
        assert decoder.length == 12

    @pytest.mark.parametrize("chunk", [None, 1, 4, 100])
    def test_prefill_and_step(self, toy: ModelSession, chunk: int | None) -> None:
        decoder = Decoder(toy, 3, 12)
        assert_close(decoder.prefill(TOKENS[:, :6], chunk=chunk), EXPECTED[:, 5])
        assert_close(decoder.prefill(TOKENS[:, 6:11], chunk=chunk), EXPECTED[:, 10])
        assert_close(decoder.step(TOKENS[:, 11]), EXPECTED[:, 11])

    def test_left_padding_changes_nothing(self, toy: ModelSession) -> None:
        lengths = [12, 7, 1]
        ids, mask = np.zeros((2, 3, 12), np.int64)
        for row, n in enumerate(lengths):
            ids[row, 12 - n :], mask[row, 12 - n :] = TOKENS[row, :n], 1
        decoder = Decoder(toy, 3, 14)
        found = decoder.forward(ids, mask)
        for row, n in enumerate(lengths):
            assert_close(found[row, 12 - n :], EXPECTED[row, :n])
        chunked = Decoder(toy, 3, 14).prefill(ids, mask, chunk=5)
        assert_close(chunked, found[:, -1])
        longer = np.stack([np.append(TOKENS[row, :n], 9) for row, n in enumerate(lengths)][1:2])
        assert_close(decoder.step([9, 9, 9])[1], latent_toy.reference(WEIGHTS, longer[0])[-1])  # padding is remembered

    def test_rows_do_not_mix(self, toy: ModelSession) -> None:
        other = TOKENS.copy()
        other[1:] = (other[1:] + 1) % VOCAB
        np.testing.assert_array_equal(toy.logits(other)[0], toy.logits(TOKENS)[0])

    def test_positions_are_passed_on(self, toy: ModelSession) -> None:
        moved = Decoder(toy, 1, 4).forward(TOKENS[:1, :4], position_ids=[[0, 1, 2, 9]])
        assert_close(moved[0, :3], EXPECTED[0, :3])
        assert np.abs(moved[0, 3] - EXPECTED[0, 3]).max() > 1e-2

    def test_reset_forgets(self, toy: ModelSession) -> None:
        decoder = Decoder(toy, 3, 12)
        decoder.forward(TOKENS[::-1], np.tril(np.ones((3, 12), int), 9))
        decoder.reset()
        assert_close(decoder.forward(TOKENS), EXPECTED)

    def test_bytes_are_those_of_the_live_tensors(self, toy: ModelSession) -> None:
        decoder = Decoder(toy, 3, 20)
        decoder.forward(TOKENS)
        assert decoder.cache_bytes_per_token() == toy.bytes_per_token == 32
        rows = 20 if toy.cache.tensors[0].kind == "shared" else 12
        assert [tuple(value.shape()) for value in decoder.cache.values()] == [(3, 1, rows, 6), (3, 1, rows, 2)]

    def test_no_cache_runs_once(self, tmp_path: Path) -> None:
        decoder = Decoder(session(small_model(tmp_path, TensorProto.FLOAT)), 1, 4)
        decoder.forward([[1, 2]])
        with pytest.raises(MlaPassError, match="has no cache inputs"):
            decoder.forward([[1]])

    def test_padding_needs_a_mask_input(self, tmp_path: Path) -> None:
        opened = session(small_model(tmp_path, TensorProto.FLOAT))
        with pytest.raises(MlaPassError, match="has no attention_mask input"):
            opened.logits([[1, 2]], [[0, 1]])


class TestInPlace:
    def test_shared_rows_are_written_where_they_lie(self, shared: ModelSession) -> None:
        decoder = Decoder(shared, 2, 9)
        latent = host_view(decoder.cache["past.0.latent"], np.dtype(np.float32))
        assert not latent.any()
        latent[:] = 77.0  # never read: rows that nobody wrote
        addresses = {name: value.data_ptr() for name, value in decoder.cache.items()}
        rows = WEIGHTS.embed[TOKENS[:2]] @ WEIGHTS.latent
        for first, last in ((0, 4), (4, 5), (5, 7)):
            assert_close(decoder.forward(TOKENS[:2, first:last]), EXPECTED[:2, first:last])
            assert {name: value.data_ptr() for name, value in decoder.cache.items()} == addresses
            assert_close(latent[:, 0, :last], rows[:, :last])
            assert (latent[:, 0, last:] == 77.0).all()

    def test_a_shared_step_does_not_copy_the_buffer(self, shared: ModelSession) -> None:
        decoder = Decoder(shared, 1, 4_000_000)  # 122 MiB
        decoder.forward(TOKENS[:1, :4])

        def best(work: object, *arguments: object) -> float:
            times = []
            for _ in range(5):
                clock = time.perf_counter()
                work(*arguments)  # type: ignore[operator]
                times.append(time.perf_counter() - clock)
            return min(times)

        buffers = [host_view(value, np.dtype(np.float32)) for value in decoder.cache.values()]
        copies = [np.ones_like(buffer) for buffer in buffers]
        copying = best(lambda: [np.copyto(to, buffer) for to, buffer in zip(copies, buffers, strict=True)])
        assert best(decoder.step, [1]) < copying / 4

    def test_growing_tensors_never_pass_through_numpy(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import onnxruntime

        decoder = Decoder(session(latent_toy.save(tmp_path, WEIGHTS, shared=False), threads=1), 3, 12)

        def refuse(*_: object) -> None:
            raise AssertionError("a value passed through numpy")

        for name in ("numpy", "ortvalue_from_numpy", "update_inplace"):
            monkeypatch.setattr(onnxruntime.OrtValue, name, refuse)
        decoder.prefill(TOKENS[:, :4])
        before = host_view(decoder.cache["past.0.latent"], np.dtype(np.float32)).copy()
        decoder.step(TOKENS[:, 4])
        after = host_view(decoder.cache["past.0.latent"], np.dtype(np.float32))
        np.testing.assert_array_equal(after[:, :, :4], before)
        assert after.shape[2] == 5


class TestBadInput:
    @pytest.mark.parametrize(
        ("ids", "told"),
        [
            ([[1, 2], [3]], "ragged"),
            ([[1.0, 2.0]], "float64"),
            ([[True]], "bool"),
            ([], "expected integers"),
            ([[[1]]], "expected integers"),
            ([[0, VOCAB]], f"from 0 to {VOCAB}; expected 0 to {VOCAB - 1}"),
            ([[-1]], "from -1"),
        ],
    )
    def test_ids(self, shared: ModelSession, ids: list, told: str) -> None:
        with pytest.raises(MlaPassError, match=told):
            shared.logits(ids)

    def test_shapes(self, shared: ModelSession) -> None:
        decoder = Decoder(shared, 2, 4)
        with pytest.raises(MlaPassError, match="hold 1 sequences; this decoder was made for 2"):
            decoder.forward([[1]])
        with pytest.raises(MlaPassError, match=r"attention_mask has shape \(2, 2\); expected \(2, 1\)"):
            decoder.forward([[1], [1]], [[1, 1], [1, 1]])
        with pytest.raises(MlaPassError, match="other values than 0"):
            decoder.forward([[1], [1]], [[2], [1]])
        with pytest.raises(MlaPassError, match="position_ids are"):
            decoder.forward([[1], [1]], position_ids=[[1]])
        with pytest.raises(MlaPassError, match="a step was given tokens of shape"):
            decoder.step([1])
        with pytest.raises(MlaPassError, match="at least 1 token"):
            decoder.prefill([[1], [1]], chunk=0)
        with pytest.raises(MlaPassError, match="batch is 0"):
            Decoder(shared, 0, 1)

    def test_capacity_is_kept(self, toy: ModelSession) -> None:
        decoder = Decoder(toy, 3, 8)
        decoder.forward(TOKENS[:, :6])
        with pytest.raises(MlaPassError, match="6 cached and 3 new tokens exceed the cache's 8 rows"):
            decoder.forward(TOKENS[:, 6:9])
        assert_close(decoder.forward(TOKENS[:, 6:8]), EXPECTED[:, 6:8])  # the refusal left no trace

    def test_positions_beyond_the_model(self, shared: ModelSession) -> None:
        with pytest.raises(MlaPassError, match="position 4096 lies beyond the model's 4096"):
            Decoder(shared, 1, 2).forward([[1]], position_ids=[[4096]])


def test_host_view_reads_bfloat16() -> None:
    import onnxruntime

    value = onnxruntime.OrtValue.ortvalue_from_shape_and_type([2, 3], int(TensorProto.BFLOAT16))
    view = host_view(value, np.dtype(ml_dtypes.bfloat16))
    view[:] = np.arange(6).reshape(2, 3)
    np.testing.assert_array_equal(host_view(value, view.dtype).astype(float), np.arange(6).reshape(2, 3))
