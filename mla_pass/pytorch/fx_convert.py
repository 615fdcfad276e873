"""Converting an exported program: read, prove, calibrate, fold, rewrite; in torch alone.

The steps are those of `mla_pass.onnx.passes`, without what needs conversions to be run and compared: metric_mix is the
usual one unless given, and sizes come from `budget`, or from `rank` and `rope_dims`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch.export import ExportedProgram

from mla_pass.calibrate import Run, tokens_needed
from mla_pass.calibrate import calibrate as moments
from mla_pass.config import MlaConfig
from mla_pass.convert import as_token_ids
from mla_pass.errors import MlaPassError
from mla_pass.export.fx import core_aten
from mla_pass.onnx.choose import Chooser, Progress, mixed
from mla_pass.onnx.emit import Conversion
from mla_pass.onnx.instrument import heads_first
from mla_pass.onnx.passes import DEFAULT_MAX_POSITIONS, MlaPass
from mla_pass.pytorch.emit import copied, emit
from mla_pass.pytorch.inputs import fed, roles_of
from mla_pass.pytorch.piece import to_numpy
from mla_pass.pytorch.view import FxView, writing
from mla_pass.site import AttentionSite


def convert_exported(
    program: ExportedProgram, config: MlaConfig | None = None, *, calibrate: np.ndarray | None = None,
    conversions: Sequence[Conversion] | None = None, progress: Progress | None = None,
) -> ExportedProgram:  # fmt: skip
    """The program with latent attention; the one given is left as it is, and shares the weights that stay.

    `calibrate`: token ids to fit the latents to. `conversions`: of the same blocks in another graph, by their names;
    they stand in for calibration and folding. The cache grows, whatever `config.cache` says: a program has no side
    effects. The metric is "output".
    Raises MlaPassError when a block cannot be read or the request cannot be served.
    """
    config = config or MlaConfig()
    check_request(config)
    own = copied(program)
    view = FxView.of(core_aten(own) if writing(own) else own)
    positions = config.max_positions or view.max_position or DEFAULT_MAX_POSITIONS
    if conversions is None:
        if calibrate is None:
            raise MlaPassError("an exported program has no tokenizer; give calibrate an array of token ids")
        conversions = fitted(view, config, as_token_ids(calibrate, "the array"), positions, progress)
    else:
        sites = {site.name: site for site in MlaPass(config, no_text).readable(view.program)[0]}
        conversions = [replace(each, site=same_site(sites, each.site)) for each in conversions]
    return emit(view, conversions, positions)


def check_request(config: MlaConfig) -> None:
    """Raises MlaPassError for what only an ONNX model can be given."""
    asked = {
        "layout genai": config.layout == "genai", "metric fisher": config.metric == "fisher",
        "max_loss": config.max_loss is not None, "cache_dtype auto": config.cache_dtype == "auto",
    }  # fmt: skip
    for name, wanted in asked.items():
        if wanted:
            raise MlaPassError(f"{name} is not offered for exported programs; leave it out, or convert the ONNX export")


def fitted(
    view: FxView, config: MlaConfig, ids: np.ndarray, positions: int, progress: Progress | None
) -> list[Conversion]:
    """Every block of the program, proved, calibrated on token ids and folded."""
    if view.max_position is not None:
        config = replace(config, calibrate_context=min(config.calibrate_context, view.max_position))
    steps = MlaPass(config, lambda count: ids, progress=progress, origin="the array")
    sites, _ = steps.readable(view.program)
    windows, _ = steps.windows(tokens_needed(sites), 0.0)

    def told(done: int, total: int) -> None:
        steps.progress("calibrating (output metric)", done, total)

    calibration = moments(sites, instrument(view, sites), windows, progress=told)
    return Chooser(view.program, sites, calibration, positions, steps.progress).plan(mixed(config))


def instrument(view: FxView, sites: Sequence[AttentionSite]) -> Run:
    """The part of the program that yields the sites' branches, over one sequence with an empty cache.

    Raises MlaPassError when the program reads more than tokens, attention mask, positions and caches.
    """
    branches = [branch for site in sites for branch in (site.query, site.key, site.value)]
    piece = view.block([branch.value for branch in branches], ())
    known = roles_of(sites)

    def forward(ids: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        tokens = torch.from_numpy(ids)[None]
        feeds = {node: fed(node, known.get(node, ""), tokens) for node in piece.needs}
        with torch.no_grad():
            found = [to_numpy(x) for x in piece.compute(feeds)]
        arrays = [heads_first(array, each) for array, each in zip(found, branches, strict=True)]
        return [(arrays[i], arrays[i + 1], arrays[i + 2]) for i in range(0, len(arrays), 3)]

    return Run(forward)


def same_site(sites: dict[str, AttentionSite], site: AttentionSite) -> AttentionSite:
    """The block of the same name. Raises MlaPassError when there is none, or it is another."""
    if site.name not in sites or sites[site.name].summary() != site.summary():
        raise MlaPassError(
            f"the conversions given are of another model: the program has no block like {site.summary()}"
        )
    return sites[site.name]


def no_text(count: int) -> np.ndarray:
    """Stands in for calibration text where conversions are given; never called."""
    raise AssertionError(f"{count} tokens of calibration text asked for, though conversions are given")
