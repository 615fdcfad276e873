"""The report adds up, says what got worse, and survives JSON."""

import json
from dataclasses import replace

import pytest

from mla_pass.errors import MlaPassError
from mla_pass.report import LayerReport, Report

LAYER = LayerReport(
    name="model.layers.0.self_attn", heads=9, kv_groups=3, head_dim=64, rank=96, rope_dims=32, kept=0.9876,
    output_error=0.0123, cache_before=1536, cache_after=512, weights_before=1000, weights_after=900, note="",
)  # fmt: skip


def report(*layers: LayerReport, refusals: tuple[str, ...] = ()) -> Report:
    return Report(layers, refusals, "float32", ())


def test_totals_add_up() -> None:
    both = report(LAYER, replace(LAYER, cache_before=10, cache_after=5, weights_before=7, weights_after=3))
    assert (both.cache_before, both.cache_after, both.weights_before, both.weights_after) == (1546, 517, 1007, 903)
    assert "1,546 to 517 (33.4%)" in both.text()


def test_nothing_worse_is_claimed_of_a_plain_gain() -> None:
    assert report(LAYER).worse() == ()
    assert "Worse" not in report(LAYER).text()


@pytest.mark.parametrize(
    ("change", "told"),
    [({"cache_after": 2000}, "cache grew from 1,536 to 2,000"), ({"weights_after": 1001}, "projections grew")],
)
def test_what_got_worse_is_told(change: dict[str, int], told: str) -> None:
    text = report(replace(LAYER, **change)).text()
    assert told in text[text.index("Worse:") :]


def test_refusals_are_told_in_full() -> None:
    text = report(LAYER, refusals=("layer 3: stopped at Softmax_7",)).text()
    assert "1 attention block was not converted" in text
    assert "layer 3: stopped at Softmax_7" in text


def test_columns_line_up_and_unmeasured_is_not_a_number() -> None:
    lines = report(LAYER, replace(LAYER, name="short", output_error=None, cache_before=123456)).text().splitlines()
    header, first, second = lines[:3]
    assert first.index("1.23e-02") + len("1.23e-02") == header.index("output error") + len("output error")
    assert second.split()[7] == "-"
    assert first.index("->") == second.index("->")


def test_a_dry_run_speaks_of_what_would_be() -> None:
    assert "would go from" in report(LAYER).text(would=True)
    assert "would" not in report(LAYER).text()


def test_json_holds_every_field() -> None:
    data = json.loads(json.dumps(report(LAYER).to_json()))
    assert LayerReport(**data["layers"][0]) == LAYER
    assert data["totals"]["cache_after"] == 512
    assert data["format_version"] == 1
    assert Report.from_json(data) == report(LAYER)


def test_json_of_another_version_is_refused() -> None:
    with pytest.raises(MlaPassError, match="format version 99"):
        Report.from_json({**report(LAYER).to_json(), "format_version": 99})


def test_an_empty_report_is_still_readable() -> None:
    assert "0 attention blocks" in report().text()
