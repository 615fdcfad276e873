"""The conversion as an onnx_ir pass, to stand in a pipeline with others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields

import numpy as np
import onnx_ir as ir

from mla_pass.budget import choose_splits
from mla_pass.calibrate import calibrate, cut_windows, tokens_needed
from mla_pass.config import MlaConfig
from mla_pass.errors import MlaPassError
from mla_pass.export.layout import MAX_POSITION_KEY
from mla_pass.fold import Geometry, Prepared, Recipe, fold, prepare
from mla_pass.measure import layer_report, output_error
from mla_pass.onnx.absorb import choose_absorption
from mla_pass.onnx.emit import Conversion, Emitter
from mla_pass.onnx.instrument import instrument
from mla_pass.patterns import find_sites
from mla_pass.proof import admit
from mla_pass.report import Report
from mla_pass.site import AttentionSite, Refusal
from mla_pass.statistics import SiteStatistics

Progress = Callable[[str, int, int], None]
DEFAULT_MAX_POSITIONS = 32768


class MlaPass(ir.passes.InPlacePass):
    """Rewrite every attention block of a decoder from cached keys and values to one cached latent row.

    1. Find the blocks; refuse the model if one cannot be read (unless ``config.partial``).
    2. Check the weights, and every block's numbers against what was read of it.
    3. Run the model over `token_ids` and keep the moments of queries, keys and values.
    4. Split the budget into rank and rope dims; fold.
    5. Replace each block by a LatentAttention node; caches become ``past.{layer}.latent`` and ``.rope``.

    `token_ids`: a function that gives calibration text as one stream of ids, called once the model is known to be
    convertible; it is told how many tokens are wanted. After a run `report` tells what was done, and `statistics` what
    calibration saw: given to another pass over the same model they spare step 3.
    Raises MlaPassError and leaves the model as it was when any step before the last fails.
    """

    def __init__(
        self, config: MlaConfig, token_ids: Callable[[int], np.ndarray], *, progress: Progress | None = None,
        origin: str = "the token ids", statistics: Sequence[SiteStatistics] | None = None,
    ) -> None:  # fmt: skip
        """`origin` names the calibration text in messages; `progress` hears (stage, done, total)."""
        super().__init__()
        self.config, self.token_ids, self.origin = config, token_ids, origin
        self.progress: Progress = progress or (lambda stage, done, total: None)
        self.statistics = statistics
        self.report: Report | None = None

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run the pass."""
        sites, refusals = self.readable(model)
        prepared = self.prepare(model, sites)
        splits = choose_splits(prepared, self.config)
        conversions, layers = [], []
        for done, (site, p, (rank, rope_dims)) in enumerate(zip(sites, prepared, splits, strict=True)):
            self.progress("folding", done, len(sites))
            weights = fold(p, rank, rope_dims)
            plan = choose_absorption(site, weights, self.config.absorb)
            conversions.append(Conversion(site, weights, plan))
            layers.append(layer_report(site, weights, plan, output_error(site, p.statistics, weights)))
        self.progress("folding", len(sites), len(sites))
        notes = self.rewrite(model, conversions)
        self.report = Report(tuple(layers), tuple(str(r) for r in refusals), sites[0].dtype, notes)
        return ir.passes.PassResult(model, modified=True)

    def readable(self, model: ir.Model) -> tuple[list[AttentionSite], list[Refusal]]:
        """The blocks that can be converted. Raises MlaPassError when there is none, or one of them cannot be."""
        self.progress("reading the graph", 0, 1)
        found = find_sites(model)
        self.progress("reading the graph", 1, 1)
        sites = [site for site in found if isinstance(site, AttentionSite)]
        for done, site in enumerate(sites):
            self.progress("checking weights", done, len(sites))
            check_finite(site)
        admitted = admit(model, found) if sites else found
        self.progress("checking weights", len(sites), len(sites))
        refusals = [r for r in admitted if isinstance(r, Refusal)]
        sites = [site for site in admitted if isinstance(site, AttentionSite)]
        if refusals and not (self.config.partial and sites):
            told = "\n".join(f"  {refusal}" for refusal in refusals)
            hint = "" if not sites else "; --partial converts the others and leaves these as they are"
            raise MlaPassError(
                f"{len(refusals)} of {len(admitted)} attention blocks cannot be converted{hint}:\n{told}"
            )
        if not sites:
            raise MlaPassError(
                "no attention found in this graph; expected a decoder with attention and a key/value cache"
            )
        return sites, refusals

    def prepare(self, model: ir.Model, sites: Sequence[AttentionSite]) -> list[Prepared]:
        """Calibrate, and do what does not depend on the split of the budget."""
        config = self.config
        if self.statistics is None:
            self.statistics = self.observe(model, sites)
        if len(self.statistics) != len(sites):
            raise MlaPassError(
                f"the statistics given are of {len(self.statistics)} attention blocks, the model has {len(sites)}; "
                "calibrate this model anew"
            )
        recipe = Recipe(**{field.name: getattr(config, field.name) for field in fields(Recipe)})
        prepared = []
        for done, (site, seen) in enumerate(zip(sites, self.statistics, strict=True)):
            self.progress("ranking components", done, len(sites))
            geometry = Geometry(site.kv_groups, site.head_dim, site.value_dim, site.rope, site.softcap > 0)
            prepared.append(prepare(geometry, seen, recipe))
        self.progress("ranking components", len(sites), len(sites))
        return prepared

    def observe(self, model: ir.Model, sites: Sequence[AttentionSite]) -> list[SiteStatistics]:
        """Run the model over the calibration text."""
        config, needed = self.config, tokens_needed(sites)
        held_out = config.calibrate_context
        wanted = max(config.calibrate_tokens, needed)
        self.progress("getting calibration text", 0, 1)
        ids = self.token_ids(wanted + held_out)
        self.progress("getting calibration text", 1, 1)
        windows = cut_windows(ids, config.calibrate_context, wanted, needed, self.origin)
        return calibrate(
            sites, instrument(model, sites), windows,
            progress=lambda done, total: self.progress("calibrating", done, total),
        )  # fmt: skip

    def rewrite(self, model: ir.Model, conversions: Sequence[Conversion]) -> tuple[str, ...]:
        """Change the graph; returns what the user should know."""
        stated = model.metadata_props.get(MAX_POSITION_KEY)
        positions = self.config.max_positions or (int(stated) if stated else DEFAULT_MAX_POSITIONS)
        notes = []
        if not (stated or self.config.max_positions):
            notes.append(f"The graph does not state its longest position; the rotary table has {positions} rows.")
        before = model.ir_version
        Emitter(model, max_positions=positions, shared_buffer=self.config.cache == "shared").emit(conversions)
        model.metadata_props[MAX_POSITION_KEY] = str(positions)
        if model.ir_version != before:
            notes.append(
                f"The IR version was raised from {before} to {model.ir_version}: layers differ in their bodies."
            )
        return tuple(notes)


def check_finite(site: AttentionSite) -> None:
    """Raises MlaPassError when a weight of the block is NaN or infinite."""
    projections = {"query": site.query, "key": site.key, "value": site.value}
    named = {name: branch.projection for name, branch in projections.items()} | {"output": site.output}
    for name, projection in named.items():
        for part in (projection.weight, projection.bias):
            if part is not None and not np.isfinite(part.read()).all():
                raise MlaPassError(
                    f"{site.name}: the {name} projection holds NaN or infinite weights; repair the checkpoint"
                )
