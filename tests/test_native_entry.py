"""The kernel without ONNX Runtime, through the library's C entry, against the float64 reference."""

from __future__ import annotations

import copy
import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

import mla_pass
from mla_pass import native
from mla_pass.errors import MlaPassError
from mla_pass.native import kernel
from mla_pass.native.kernel import Layout, Operand
from mla_pass.onnx.body import ATTRIBUTES, INPUTS, node_attributes
from tests.native_cases import (
    FLOAT32_ERROR,
    STORED,
    Case,
    Drawn,
    cases,
    check,
    environment,
    needs_library,
    open_model,
    run_session,
)

ROOT = Path(__file__).parents[1]
pytestmark = needs_library


class Node:
    """A case with its operands in memory, ready to be called once; `feeds` hold the cache that is written."""

    def __init__(self, drawn: Drawn) -> None:
        self.drawn, c = drawn, drawn.case
        self.attributes: dict[str, Any] = {
            a.name: a.value for a in node_attributes(drawn.variant, drawn.weights.rope_index)
        }
        absent = {
            "padding_mask": not c.padding, "attention_bias": not c.bias, "query_map": not c.query_map,
            "key_up": not c.key_up, "key_mean": not c.key_up, "value_up": not c.value_up,
        }  # fmt: skip
        feeds = drawn.feeds()
        self.feeds = {name: np.ascontiguousarray(feeds[name]) for name in INPUTS if not absent.get(name)}
        heads = c.heads * drawn.weights.value_up.shape[2]
        self.context = np.full((c.batch, c.new, heads), np.nan, self.feeds["query"].dtype)

    def inputs(self) -> list[Operand | None]:
        return [operand(self.feeds[name]) if name in self.feeds else None for name in INPUTS]

    def call(self, layout: Layout | None = None, threads: int = 1) -> list[np.ndarray]:
        layout = Layout(self.attributes) if layout is None else layout
        layout.attend(self.inputs(), operand(self.context), threads)
        return self.outputs()

    def outputs(self) -> list[np.ndarray]:
        return [self.context, self.feeds["past_latent"], self.feeds["past_rope"]]

    def check(self, layout: Layout | None = None, threads: int = 1) -> None:
        check(self.drawn, self.call(layout, threads), self.drawn.kernel_error())


def same(outputs: list[np.ndarray], others: list[np.ndarray]) -> None:
    for a, b in zip(outputs, others, strict=True):
        np.testing.assert_array_equal(a, b)


def operand(array: np.ndarray) -> Operand:
    return Operand(array.ctypes.data, array.dtype.name, array.shape)


@given(cases())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_reference_and_kernel_agree(case: Case) -> None:
    for form in ("absorbed", "expanded"):
        node = Node(Drawn(replace(case, shared=True)))
        with environment(form=form):
            layout = Layout(node.attributes)
        node.check(layout, threads=2)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("new", [1, 7])
@pytest.mark.parametrize("bias", ["", "bh"])
@pytest.mark.parametrize(
    ("dtype", "latent", "rope"),
    [
        ("float32", "same", "same"), ("float32", "bfloat16", "float16"), ("float32", "int8", "float8"),
        ("bfloat16", "same", "same"), ("bfloat16", "int8", "same"),
        ("float16", "same", "same"), ("float16", "int8", "int8"),
    ],
)  # fmt: skip
def test_every_type_of_row(dtype: str, latent: str, rope: str, bias: str, new: int, threads: int) -> None:
    # Padded on the left, in a cache that is longer than what is filled.
    drawn = Drawn(Case(batch=2, past=90, new=new, blocks=(4, 16), dtype=dtype, latent=latent, rope=rope, bias=bias))
    assert drawn.pads.max() > 0
    Node(drawn).check(threads=threads)


@pytest.mark.parametrize("new", [1, 40])
def test_any_number_of_threads(new: int) -> None:
    # Long enough for several parts a tile, as many as there are threads: each number of them rounds in its own way.
    drawn = Drawn(Case(batch=2, past=1500, new=new, blocks=(16, 64)))
    for threads in (1, 2, 5):
        node, again = Node(drawn), Node(drawn)
        node.check(threads=threads)
        same(node.call(threads=threads), again.call(threads=threads))


@pytest.mark.parametrize("new", [1, 7])
def test_the_numbers_are_those_of_a_session(new: int) -> None:
    node = Node(Drawn(Case(batch=2, past=90, new=new, blocks=(4, 16), dtype="float16", latent="int8", bias="b")))
    want = run_session(open_model(node.drawn.model()), node.drawn.feeds())
    same(node.call(), want)


@pytest.mark.parametrize(("name", "changes"), [("past_rope", {"rope_dim": 0}), ("value_up", {"value_offset": 32})])
def test_an_empty_tensor_without_memory_is_not_an_absent_one(name: str, changes: dict[str, int]) -> None:
    node = Node(Drawn(Case(blocks=(4,), **changes)))
    assert node.feeds[name].size == 0
    inputs = node.inputs()
    inputs[INPUTS.index(name)] = operand(node.feeds[name])._replace(pointer=0)
    Layout(node.attributes).attend(inputs, operand(node.context), 1)
    check(node.drawn, node.outputs(), FLOAT32_ERROR)


def test_inputs_may_end_with_the_last_that_is_there() -> None:
    node = Node(Drawn(Case(padding=False, query_map=False, key_up=False, value_up=False)))
    inputs = node.inputs()
    assert inputs[8:] == [None] * 6
    Layout(node.attributes).attend(inputs[:8], operand(node.context), 1)
    check(node.drawn, node.outputs(), FLOAT32_ERROR)


def test_a_step_copies_no_cache_and_asks_for_no_memory() -> None:
    node = Node(Drawn(Case(past=600, blocks=(16, 64), padding=False)))
    layout = Layout(node.attributes)
    node.call(layout)
    before = native.counters()
    for _ in range(5):
        node.call(layout)
    assert native.counters() == before


class TestCallers:
    """Threads of Python's: calls let each other run, and share layouts and the library's threads."""

    def at_once(self, works: list[Callable[[], object]]) -> None:
        start, failed = threading.Barrier(len(works)), []

        def run(work: Callable[[], object]) -> None:
            start.wait()
            try:
                work()
            except BaseException as error:
                failed.append(error)
                raise

        threads = [threading.Thread(target=run, args=(work,)) for work in works]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed

    def test_two_at_once_give_the_numbers_of_one(self) -> None:
        # Of two shapes, so that what one of them packs cannot serve the other.
        drawns = [Drawn(Case(batch=batch, past=700, new=new, blocks=(16,))) for batch, new in ((1, 1), (2, 5))]
        layout = Layout(Node(drawns[0]).attributes)
        want = [Node(drawn).call(layout, threads=2) for drawn in drawns]
        nodes = [Node(drawn) for drawn in drawns]

        def work(node: Node) -> None:
            for _ in range(30):
                node.call(layout, threads=2)

        self.at_once([lambda node=node: work(node) for node in nodes])
        for node, outputs in zip(nodes, want, strict=True):
            same(node.outputs(), outputs)

    def test_one_may_fail_while_another_works(self) -> None:
        good, bad = (Node(Drawn(Case(batch=2, past=700, padding=False))) for _ in range(2))
        layout = Layout(good.attributes)
        bad.feeds["total_length"][:] = 9999

        def fails() -> None:
            for _ in range(30):
                with pytest.raises(MlaPassError, match="the cache is full"):
                    bad.call(layout, threads=2)

        def works() -> None:
            for _ in range(30):
                good.call(layout, threads=2)

        self.at_once([fails, works])
        good.check(layout, threads=2)


class TestTheLibrarysThreads:
    def test_are_started_when_needed_and_kept(self) -> None:
        # In a process of its own, where nothing else has threads.
        lines = """
            import os
            from tests.native_cases import Case, Drawn
            from tests.test_native_entry import Node
            def threads():
                return len(os.listdir("/proc/self/task"))
            node, before = Node(Drawn(Case(batch=2, past=1500))), threads()
            for asked in (1, 2, 4, 2, 1):
                node.call(threads=asked)
                print(threads() - before)
        """
        code = "\n".join(line[12:] for line in lines.splitlines())
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
        assert ran.stdout.split() == ["0", "1", "3", "3", "3"], ran.stderr

    @pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
    def test_a_forked_child_has_its_own(self) -> None:
        node, other = (Node(Drawn(Case(batch=2, past=1500, blocks=(16, 64)))) for _ in range(2))
        want = node.call(threads=3)
        child = os.fork()
        if child == 0:
            signal.alarm(20)  # a child that waits for its parent's threads waits forever
            alone = len(os.listdir("/proc/self/task")) == 1
            got = other.call(threads=3)
            joined = len(os.listdir("/proc/self/task")) == 3
            agrees = all(np.array_equal(a, b, equal_nan=True) for a, b in zip(got, want, strict=True))
            os._exit(4 * (not alone) + 2 * (not joined) + (not agrees))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        node.check(threads=3)

    @pytest.mark.parametrize("threads", [1, 2])
    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_what_a_task_throws_is_told(self, bad: float, threads: int) -> None:
        # Rows are packed by several tasks, each of which may meet the number.
        node = Node(Drawn(Case(batch=3, new=70, latent="int8", padding=False)))
        node.feeds["row"][:, 3, 3] = bad
        with pytest.raises(MlaPassError, match="LatentAttention: input row holds a number that is not finite"):
            node.call(threads=threads)
        Node(node.drawn).check(threads=threads)


@pytest.fixture(scope="module")
def drawn() -> Drawn:
    return Drawn(Case(batch=2, past=10, new=2, blocks=(4,), bias="b"))


class TestBadInput:
    """tests/test_native.py has every sentence of the contract; here, that they arrive, and what only the entry asks."""

    @pytest.mark.parametrize(
        ("name", "changed", "told"),
        [
            ("query", {"shape": (2, 2, 63)}, r"input query is float32 \[2, 2, 63\]; expected .* tokens >= 1, 64\]"),
            ("query", {"shape": ()}, r"input query is float32 \[\]; expected \[batch, tokens, num_heads \* head"),
            ("row", {"shape": (1,) * 9}, r"input row has 9 dimensions; expected at most 8"),
            ("past_rope", {"shape": (2, 1, 14, 8)}, r"input past_rope is .*14, 8\]; expected float32 \[2, 1, 15, 8\]"),
            ("past_latent", {"dtype": "float64"}, r"input past_latent is ONNX type 11 .*; expected float32 \[2, 1, r"),
            ("key_up", {"dtype": "float16"}, r"input key_up is float16 \[2, 6, 32\]; expected float32 \[2, 6, 32\]"),
            ("query", {"dtype": "int64"}, r"input query is of ONNX type 7; expected float32, float16 or bfloat16"),
            ("cos", {"dtype": "complex64"}, r"a tensor is of type complex64; expected one of float32, "),
            ("value_up", {"pointer": 0}, r"input value_up points to no memory; expected the address of its elements"),
        ],
    )
    def test_an_operand(self, drawn: Drawn, name: str, changed: dict[str, Any], told: str) -> None:
        node = Node(drawn)
        inputs = node.inputs()
        inputs[INPUTS.index(name)] = operand(node.feeds[name])._replace(**changed)
        with pytest.raises(MlaPassError, match=f"^LatentAttention: {told}"):
            Layout(node.attributes).attend(inputs, operand(node.context), 1)
        assert np.isnan(node.context).all()
        np.testing.assert_array_equal(node.feeds["past_latent"], drawn.feeds()["past_latent"])

    def test_a_required_operand_that_is_absent(self, drawn: Drawn) -> None:
        node = Node(drawn)
        with pytest.raises(MlaPassError, match=r"input query is absent; expected \[batch, tokens, "):
            Layout(node.attributes).attend([None, *node.inputs()[1:]], operand(node.context), 1)
        with pytest.raises(MlaPassError, match=r"input key_up is absent; expected it, for the node has bands"):
            Layout(node.attributes).attend(node.inputs()[:11], operand(node.context), 1)

    def test_more_operands_than_there_are(self, drawn: Drawn) -> None:
        node = Node(drawn)
        with pytest.raises(MlaPassError, match="LatentAttention: 15 inputs; expected at most 14"):
            Layout(node.attributes).attend([*node.inputs(), None], operand(node.context), 1)

    @pytest.mark.parametrize(
        ("changed", "told"),
        [
            ({"shape": (2, 2, 63)}, r"output context is \[2, 2, 63\]; expected \[2, 2, 64\]"),
            ({"shape": (2, 128)}, r"output context is of 2 dimensions; expected \[2, 2, 64\]"),
            ({"dtype": "float16"}, r"output context is of ONNX type 10; expected 1, the query's"),
            ({"pointer": 0}, r"output context points to no memory; expected"),
        ],
    )
    def test_the_context(self, drawn: Drawn, changed: dict[str, Any], told: str) -> None:
        node = Node(drawn)
        with pytest.raises(MlaPassError, match=f"^LatentAttention: {told}"):
            Layout(node.attributes).attend(node.inputs(), operand(node.context)._replace(**changed), 1)

    @pytest.mark.parametrize(
        ("name", "value", "told"),
        [
            ("total_length", 16, r"the cache is full: input past_latent has room for 15 rows, and total_length is 16"),
            ("position_ids", 12, r"input position_ids holds 12; expected 0 to 11, the rows of cos"),
        ],
    )
    def test_a_value(self, drawn: Drawn, name: str, value: int, told: str) -> None:
        node = Node(drawn)
        node.feeds[name][:] = value
        with pytest.raises(MlaPassError, match=f"^LatentAttention: {told}"):
            node.call()

    def test_threads(self, drawn: Drawn) -> None:
        with pytest.raises(MlaPassError, match="LatentAttention: threads is 0; expected at least 1"):
            Node(drawn).call(threads=0)

    @pytest.mark.parametrize(
        ("name", "value", "told"),
        [
            ("num_heads", 5, "is 5; expected a multiple of kv_groups, 2"),
            ("rank", 32.5, "is 32.5; expected an int"),
            ("rank", 1 << 64, f"is {1 << 64}; expected an int"),
            ("rope_index", [0.5], "is \\[0.5\\]; expected a list of ints"),
            ("band_a0", "ab", "is 'ab'; expected a list of floats"),
            ("scale", None, "is None; expected a float"),
            ("band_a1", [1.0, 2.0], "has 2 entries; expected 1, as many as band_index"),
            ("shared_buffer", 0, "is 0; expected 1, for the cache is written in place"),
        ],
    )
    def test_an_attribute(self, drawn: Drawn, name: str, value: object, told: str) -> None:
        with pytest.raises(MlaPassError, match=f"^LatentAttention: attribute {name} {told}"):
            Layout(Node(drawn).attributes | {name: value})

    @pytest.mark.parametrize("name", ATTRIBUTES)
    def test_a_missing_attribute(self, drawn: Drawn, name: str) -> None:
        attributes = Node(drawn).attributes
        del attributes[name]
        with pytest.raises(MlaPassError, match=f"attribute {name} is absent; expected every attribute"):
            Layout(attributes)

    def test_the_environment(self, drawn: Drawn) -> None:
        with environment(form="folded"), pytest.raises(MlaPassError, match="MLA_PASS_FORM is 'folded'; expected"):
            Layout(Node(drawn).attributes)
        with environment(isa="m" * 5000), pytest.raises(MlaPassError, match="MLA_PASS_ISA is 'mmm"):
            Layout(Node(drawn).attributes)

    def test_no_library(self, drawn: Drawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(mla_pass, "__path__", [str(tmp_path)])
        with pytest.raises(MlaPassError, match=r"libmla_pass.so is not built; .* install a C\+\+ compiler"):
            Layout(Node(drawn).attributes)

    def test_an_older_library(self, drawn: Drawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        library = next(Path("/lib").glob("*/libm.so.6"), None)
        if library is None:
            pytest.skip("no library at hand that lacks the functions")
        (tmp_path / "lib").mkdir()
        (tmp_path / "lib" / "libmla_pass.so").symlink_to(library)
        monkeypatch.setattr(mla_pass, "__path__", [str(tmp_path)])
        with pytest.raises(MlaPassError, match=r"is of another version \(.*mla_pass_layout.*\); install"):
            Layout(Node(drawn).attributes)


class TestLayout:
    def test_a_copy_outlives_the_original(self, drawn: Drawn) -> None:
        layout = Layout(Node(drawn).attributes)
        copies = [copy.copy(layout), copy.deepcopy(layout)]
        del layout
        gc.collect()
        for each in copies:
            Node(drawn).check(each)

    def test_names_are_those_of_the_operator(self) -> None:
        assert {name for name, _ in kernel._FIELDS} == set(ATTRIBUTES)
        assert len(INPUTS) == kernel.INPUTS
        assert {dtype.name for dtype in STORED.values()} <= set(kernel.TYPES)
