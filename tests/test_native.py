"""The fused kernel, on every instruction set that runs here, against the float64 reference and the function body."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings

from mla_pass import native
from mla_pass.onnx.session import host_view
from tests.native_cases import (
    BODY_ERROR,
    FLOAT32_ERROR,
    ROUNDING,
    Case,
    Drawn,
    as_numbers,
    cases,
    check,
    needs_library,
    open_model,
    ort_value,
    run_session,
)

pytestmark = needs_library
INSTRUCTION_SETS = native.instruction_sets() if native.find_library() else ()
FORMS = ("absorbed", "expanded", "")


@given(cases())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_reference_body_and_kernels_agree(case: Case) -> None:
    drawn = Drawn(case)
    model, feeds = drawn.model(), drawn.feeds()
    for isa in INSTRUCTION_SETS:
        for form in ("absorbed", "expanded"):
            outputs = run_session(open_model(model, isa=isa, form=form), feeds)
            check(drawn, outputs, drawn.kernel_error(isa))
    if case.body_agrees:
        body = open_model(model, library=False)
        check(drawn, run_session(body, feeds), BODY_ERROR[case.dtype])


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("new", [1, 5, 60])
def test_bands_of_three_levels(isa: str, dtype: str, new: int) -> None:
    # Long enough that blocks of every level end within the cache, and within a chunk of the kernel's. The last level's
    # alone are absorbed.
    case = Case(past=700, new=new, blocks=(4, 4, 4, 16, 16, 256), dtype=dtype, rank=48, key_rank=40, value_offset=6)
    drawn = Drawn(case)
    model, feeds = drawn.model(), drawn.feeds()
    for form in FORMS:
        check(drawn, run_session(open_model(model, isa=isa, form=form), feeds), drawn.kernel_error(isa))


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize(("latent", "cut"), [("bfloat16", -1.0), ("int8", -1.0), ("float8", 0.3)])
def test_narrow_rows_meet_exact_queries(isa: str, latent: str, cut: float) -> None:
    # Queries of few bits that no map touches are exact in every arithmetic. What is left to round are weights, rows
    # whose scale is no power of two, and the rotated queries: 2^-9 of a number each at the most.
    case = Case(past=200, rank=23, key_rank=17, value_offset=5, rope_dim=6, query_map=False, key_up=False,
                value_up=False, padding=False, latent=latent, rope=latent, cut=cut)  # fmt: skip
    drawn = Drawn(case)
    drawn.query = np.round(2 * drawn.query) / 2
    _, *stored = outputs = run_session(open_model(drawn.model(), isa=isa, form="absorbed"), drawn.feeds())
    want = drawn.want(np.concatenate([as_numbers(part[:, 0, : case.total]) for part in stored], axis=2))
    np.testing.assert_allclose(outputs[0], want, rtol=0, atol=2.0**-7 * np.abs(want).max())


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_queries_of_many_blocks(isa: str) -> None:
    # So few queries and so many pairs a level that all are absorbed, and more blocks than are made at a time.
    bands = (*(16,) * 6, *(64,) * 6, 256, 256)
    drawn = Drawn(Case(past=1500, blocks=bands, per_group=1, rank=48, key_rank=40, padding=False))
    context, *_ = run_session(open_model(drawn.model(), isa=isa, form="absorbed"), drawn.feeds())
    want = drawn.want(drawn.cache())
    np.testing.assert_allclose(context, want, rtol=0, atol=FLOAT32_ERROR * np.abs(want).max())


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("form", FORMS)
def test_rows_outside_the_window_are_not_read(isa: str, form: str) -> None:
    drawn = Drawn(Case(past=300, new=3, window=70, blocks=(16, 16, 64), padding=False))
    feeds = drawn.feeds()
    for name in ("past_latent", "past_rope"):
        feeds[name][:, :, : 300 - 70 + 1] = np.nan
    context, latent, _ = run_session(open_model(drawn.model(), isa=isa, form=form), feeds)
    want = drawn.want(drawn.cache())
    np.testing.assert_allclose(context, want, rtol=0, atol=FLOAT32_ERROR * np.abs(want).max())
    assert np.isnan(latent[:, :, :231]).all()


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("form", FORMS)
def test_padding_on_the_left_is_not_read(isa: str, form: str) -> None:
    drawn = Drawn(Case(batch=3, past=90, new=2, seed=3))
    feeds = drawn.feeds()
    assert len(set(drawn.pads)) == 3 and drawn.pads.max() > 0
    for b, pad in enumerate(drawn.pads):
        feeds["past_latent"][b, :, : min(pad, 90)] = np.nan
    context, *_ = run_session(open_model(drawn.model(), isa=isa, form=form), feeds)
    want = drawn.want(drawn.cache())
    np.testing.assert_allclose(context, want, rtol=0, atol=FLOAT32_ERROR * np.abs(want).max())


@pytest.mark.parametrize("form", FORMS)
def test_a_query_that_sees_nothing_gives_zeros(form: str) -> None:
    drawn = Drawn(Case(batch=2, past=10, new=3))
    feeds = drawn.feeds()
    feeds["padding_mask"][1] = 0
    context, *_ = run_session(open_model(drawn.model(), form=form), feeds)
    assert (context[1] == 0).all() and (context[0] != 0).any()


@pytest.mark.parametrize("form", FORMS)
def test_a_nan_is_not_hidden(form: str) -> None:
    # Bad numbers must come out as bad numbers, not as the attention over the rest.
    drawn = Drawn(Case(batch=2, padding=False))
    feeds = drawn.feeds()
    feeds["past_latent"][1, 0, 4, 7] = np.nan
    context, *_ = run_session(open_model(drawn.model(), form=form), feeds)
    assert np.isnan(context[1]).all() and np.isfinite(context[0]).all()


@pytest.mark.parametrize("new", [1, 40])
def test_threads_give_the_same_numbers(new: int) -> None:
    # Long enough for several parts a tile where a machine has several cores.
    drawn = Drawn(Case(batch=2, past=1500, new=new, blocks=(16, 64)))
    model, feeds = drawn.model(), drawn.feeds()
    one, four = (run_session(open_model(model, threads=threads), feeds) for threads in (1, 4))
    for a, b in zip(one, four, strict=True):
        np.testing.assert_array_equal(a, b)
    check(drawn, four, FLOAT32_ERROR)


class TestDecoding:
    """A step in a shared buffer: bound as input and output, as a decoder does it."""

    def open(self, threads: int):
        drawn = Drawn(Case(past=600, new=1, spare=40, blocks=(16, 64), dtype="float16", padding=False))
        session = open_model(drawn.model(), threads=threads)
        values = {name: ort_value(drawn.feeds()[name]) for name in (i.name for i in session.get_inputs())}
        binding = session.io_binding()
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("context")
        for name in ("latent", "rope"):
            binding.bind_ortvalue_output(name, values[f"past_{name}"])
        return drawn, session, binding, values

    @pytest.mark.parametrize("threads", [1, 2])
    def test_a_step_allocates_nothing_and_copies_no_cache(self, threads: int) -> None:
        drawn, session, binding, values = self.open(threads)
        before = {name: values[name].data_ptr() for name in ("past_latent", "past_rope")}
        warm = native.counters()
        for _ in range(3):
            session.run_with_iobinding(binding)
        after = native.counters()
        assert after.copied_bytes == warm.copied_bytes
        for _ in range(20):
            session.run_with_iobinding(binding)
        # Rooms are one a thread at work: after the first steps there are enough of them.
        assert native.counters().scratch_growths - after.scratch_growths <= (0 if threads == 1 else 2)
        outputs = binding.get_outputs()
        assert outputs[1].data_ptr() == before["past_latent"] and outputs[2].data_ptr() == before["past_rope"]
        stored = host_view(values["past_latent"], np.dtype(np.float16))
        np.testing.assert_array_equal(stored[:, :, 600], drawn.feeds()["row"][..., :32])

    def test_a_present_that_is_not_its_past_is_copied_and_counted(self) -> None:
        drawn = Drawn(Case(past=50, new=1, spare=10, padding=False))
        session, feeds = open_model(drawn.model()), drawn.feeds()
        before = native.counters().copied_bytes
        run_session(session, feeds)
        rows = feeds["past_latent"].nbytes + feeds["past_rope"].nbytes
        assert native.counters().copied_bytes - before == rows


@pytest.fixture(scope="module")
def drawn() -> Drawn:
    return Drawn(Case(batch=2, past=10, new=2, blocks=(4,), bias="b"))


@pytest.fixture(scope="module")
def session(drawn: Drawn):
    return open_model(drawn.model())


class TestBadInput:
    """Every input is checked before anything is read through it."""

    @pytest.mark.parametrize(
        ("name", "shape", "told"),
        [
            ("query", (2, 2, 63), r"input query is float32 \[2, 2, 63\]; expected .* \[batch >= 1, tokens >= 1, 64\]"),
            ("row", (2, 2, 39), r"input row is float32 \[2, 2, 39\]; expected float32 \[2, 2, 40\]"),
            ("row", (1, 2, 40), r"input row is float32 \[1, 2, 40\]; expected float32 \[2, 2, 40\]"),
            ("past_latent", (2, 1, 15, 31), r"input past_latent is .*; expected float32 \[2, 1, rows, 32\]"),
            ("past_rope", (2, 1, 14, 8), r"input past_rope is .*14, 8\]; expected float32 \[2, 1, 15, 8\]"),
            ("cos", (11, 8), r"input cos is float32 \[11, 8\]; expected float32 \[positions >= 12, rotary pairs\]"),
            ("sin", (12, 7), r"input sin is float32 \[12, 7\]; expected float32 \[12, 8\]"),
            ("position_ids", (2, 3), r"input position_ids is int64 \[2, 3\]; expected int64 \[2, 2\]"),
            ("total_length", (2,), r"input total_length is int64 \[2\]; expected int64 \[1\]"),
            ("padding_mask", (2, 11), r"input padding_mask is int64 \[2, 11\]; expected int64 \[2, 12\]"),
            ("attention_bias", (2, 3, 2, 12), r"input attention_bias is .*; expected float32 \[2, 4, 2, 12\]"),
            ("query_map", (2, 16, 13), r"input query_map is .*; expected float32 \[2, head size >= 1, 14\]"),
            ("key_up", (2, 6, 31), r"input key_up is .*; expected float32 \[2, 6, 32\]"),
            ("key_mean", (1, 6), r"input key_mean is float32 \[1, 6\]; expected float32 \[2, 6\]"),
            ("value_up", (2, 31, 16), r"input value_up is .*; expected float32 \[2, 32, value head size >= 1\]"),
        ],
    )
    def test_a_wrong_shape(self, drawn: Drawn, session, name: str, shape: tuple[int, ...], told: str) -> None:
        feeds = drawn.feeds()
        feeds[name] = np.ones(shape, feeds[name].dtype)
        with pytest.raises(Exception, match=f"LatentAttention: {told}"):
            run_session(session, feeds)

    @pytest.mark.parametrize(
        ("name", "value", "told"),
        [
            ("total_length", 16, r"cache is full: input past_latent has room for 15 rows, and total_length is 16 with"),
            ("total_length", 1, r"input total_length is 1; expected at least the 2 new tokens"),
            ("total_length", -4, r"input total_length is -4; expected at least"),
            ("position_ids", 12, r"input position_ids holds 12; expected 0 to 11, the rows of cos"),
            ("position_ids", -1, r"input position_ids holds -1; expected 0 to 11"),
        ],
    )
    def test_a_wrong_value(self, drawn: Drawn, session, name: str, value: int, told: str) -> None:
        feeds = drawn.feeds()
        feeds[name] = np.full_like(feeds[name], value)
        with pytest.raises(Exception, match=told):
            run_session(session, feeds)

    def test_a_growing_cache_of_another_length(self) -> None:
        drawn = Drawn(Case(past=10, new=2, shared=False, padding=False))
        feeds = drawn.feeds() | {"total_length": np.array([13])}
        with pytest.raises(Exception, match=r"input total_length is 13; expected 12: the 10 rows of past_latent and 2"):
            run_session(open_model(drawn.model()), feeds)

    @pytest.mark.parametrize(
        ("attribute", "value", "told"),
        [
            ("num_heads", 5, "attribute num_heads is 5; expected a multiple of kv_groups, 2"),
            ("key_rank", 33, "attribute key_rank is 33; expected 0 to 32"),
            ("value_offset", -1, "attribute value_offset is -1; expected 0 to 32"),
            ("rope_dim", 7, "attribute rope_dim is 7; expected an even number"),
            ("rope_index", [1], "attribute rope_index has 1 entries; expected 4, half of rope_dim"),
            ("band_a0", [1.0, 2.0], "attribute band_a0 has 2 entries; expected 1, as many as band_index"),
            ("nope_dim", 1, "attribute band_index has 1 entries; expected at most half of nope_dim, 1"),
            ("softcap", -1.0, "attribute softcap is -1.000000; expected 0 or a positive number"),
            ("band_block", [0], "attribute band_block is 0; expected 1 to"),
        ],
    )
    def test_a_wrong_attribute(self, drawn: Drawn, attribute: str, value: object, told: str) -> None:
        model = drawn.model()
        (wrong,) = (a for a in model.graph.node[0].attribute if a.name == attribute)
        wrong.CopyFrom(onnx.helper.make_attribute(attribute, value))
        with pytest.raises(Exception, match=f"LatentAttention: {told}"):
            open_model(model)

    def test_blocks_that_do_not_nest(self) -> None:
        with pytest.raises(Exception, match="attribute band_block goes from 4 to 6; expected finest blocks first"):
            open_model(Drawn(Case(blocks=(4, 6))).model())

    def test_a_missing_attribute(self, drawn: Drawn) -> None:
        model = drawn.model()
        node = model.graph.node[0]
        kept = [a for a in node.attribute if a.name != "scale"]
        del node.attribute[:]
        node.attribute.extend(kept)
        with pytest.raises(Exception, match="attribute scale cannot be read .* expected a float written on the node"):
            open_model(model)

    def test_bands_without_key_up(self) -> None:
        drawn = Drawn(Case(blocks=(4,), rank=8, key_rank=8, still=6))
        model, feeds = drawn.model(), drawn.feeds()
        for name in ("key_up", "key_mean"):
            model.graph.node[0].input[list(model.graph.node[0].input).index(name)] = ""
        with pytest.raises(Exception, match="input key_up is absent; expected it, for the node has bands"):
            run_session(open_model(model), feeds)

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    @pytest.mark.parametrize("dtype", ["int8", "float8"])
    def test_a_number_that_8_bits_cannot_hold(self, dtype: str, bad: float) -> None:
        drawn = Drawn(Case(latent=dtype, padding=False))
        feeds = drawn.feeds()
        feeds["row"][0, 0, 3] = bad
        with pytest.raises(Exception, match="LatentAttention: input row holds a number that is not finite; expected"):
            run_session(open_model(drawn.model()), feeds)

    @pytest.mark.parametrize(("dtype", "element"), [("int8", "int8"), ("float8", "uint8")])
    def test_an_8_bit_cache_without_room_for_its_codes(self, dtype: str, element: str) -> None:
        drawn = Drawn(Case(latent=dtype, padding=False))
        feeds = drawn.feeds()
        feeds["past_latent"] = feeds["past_latent"][..., :-4]
        want = rf"input past_latent is {element} .*, 32\]; expected {element} \[1, 1, rows, 36\]"
        with pytest.raises(Exception, match=want):
            run_session(open_model(drawn.model()), feeds)

    def test_an_unknown_instruction_set(self, drawn: Drawn) -> None:
        with pytest.raises(Exception, match=f"MLA_PASS_ISA is 'mmx'; expected .*: {', '.join(INSTRUCTION_SETS)}"):
            open_model(drawn.model(), isa="mmx")

    def test_an_unknown_form(self, drawn: Drawn) -> None:
        with pytest.raises(Exception, match="MLA_PASS_FORM is 'folded'; expected absorbed, expanded or nothing"):
            open_model(drawn.model(), form="folded")
