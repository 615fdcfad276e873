"""The fused kernel, on every instruction set that runs here, against the float64 reference and the function body."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from mla_pass import native
from tests.native_cases import (
    BODY_ERROR,
    FLOAT32_ERROR,
    ROUNDING,
    Case,
    Drawn,
    cases,
    check,
    needs_library,
    open_model,
    run_session,
)

pytestmark = needs_library
INSTRUCTION_SETS = native.instruction_sets() if native.find_library() else ()
FORMS = ("absorbed", "expanded", "")


@given(cases())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_reference_body_and_kernels_agree(case: Case) -> None:
    drawn = Drawn(case)
    model, feeds = drawn.model(), drawn.feeds()
    for isa in INSTRUCTION_SETS:
        for form in FORMS:
            outputs = run_session(open_model(model, isa=isa, form=form), feeds)
            check(drawn, outputs, ROUNDING[case.dtype] + FLOAT32_ERROR)
    if case.body_agrees:
        body = open_model(model, library=False)
        check(drawn, run_session(body, feeds), BODY_ERROR[case.dtype])
