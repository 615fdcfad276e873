"""Why a walk went no further."""

from __future__ import annotations

from mla_pass.site import Handle

REPORT = "this form is not read yet: export with mla-pass export, or report the graph"


class Stop(Exception):
    """Raised by any step of the walk; `walk.find_sites` turns it into a `Refusal` and names the layer."""

    def __init__(self, value: Handle, expected: str, advice: str = REPORT) -> None:
        super().__init__(expected)
        self.value, self.expected, self.advice = value, expected, advice
