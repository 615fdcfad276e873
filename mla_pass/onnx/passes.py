"""The conversion as an onnx_ir pass, to stand in a pipeline with others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import onnx_ir as ir

from mla_pass.calibrate import ROUNDING, calibrate, calibrate_fisher, tokens_needed
from mla_pass.config import MlaConfig
from mla_pass.errors import MlaPassError
from mla_pass.export.layout import MAX_POSITION_KEY
from mla_pass.measure import layer_report, output_error
from mla_pass.onnx.choose import Chooser, Progress
from mla_pass.onnx.emit import Conversion, Emitter
from mla_pass.onnx.instrument import instrument
from mla_pass.onnx.paged import PagedEmitter, paged_site, require_sixteen_bits
from mla_pass.patterns import find_sites
from mla_pass.proof import admit
from mla_pass.report import Report
from mla_pass.site import AttentionSite, Refusal
from mla_pass.statistics import Calibration, Metric
from mla_pass.windows import HELD_OUT, cut_windows, mixed

DEFAULT_MAX_POSITIONS = 32768


class MlaPass(ir.passes.InPlacePass):
    """Rewrite every attention block of a decoder from cached keys and values to one cached latent row.

    1. Find the blocks; refuse the model if one cannot be read (unless ``config.partial``).
    2. Check the weights, and every block's numbers against what was read of it.
    3. Run the model over `token_ids` and keep the moments of queries, keys and values.
    4. Make the choices that the configuration leaves open; split the budget; fold.
    5. Replace each block by a LatentAttention node; caches become ``past.{layer}.latent`` and ``.rope``.

    `token_ids`: a function that gives calibration text as one stream of ids, called once the model is known to be
    convertible; it is told how many tokens are wanted. `written` gives what the model writes itself, so many rows of so
    many tokens; without it the text stands alone. After a run `report` tells what was done, `settled` with which
    configuration, `conversions` each block's weights, and `calibration` what calibration saw: given to another pass
    over the same model it spares step 3.
    Raises MlaPassError and leaves the model as it was when any step before the last fails.
    """

    def __init__(
        self, config: MlaConfig, token_ids: Callable[[int], np.ndarray], *, progress: Progress | None = None,
        origin: str = "the token ids", calibration: Calibration | None = None,
        written: Callable[[int, int], np.ndarray] | None = None, dtype: str | None = None,
    ) -> None:  # fmt: skip
        """`origin` names the calibration text in messages; `progress` hears (stage, done, total). `dtype`: what the
        model's own cache is of, and budgets are counted in, where that is not what its graph computes in."""
        super().__init__()
        self.config, self.token_ids, self.origin, self.written = config, token_ids, origin, written
        self.progress: Progress = progress or (lambda stage, done, total: None)
        self.calibration, self.dtype = calibration, dtype
        self.notes: list[str] = []
        self.settled: MlaConfig | None = None
        self.conversions: tuple[Conversion, ...] = ()
        self.report: Report | None = None

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run the pass."""
        sites, refusals = self.readable(model)
        if self.calibration is None:
            self.calibration = self.observe(model, sites)
        check_calibration(self.calibration, sites)
        positions, notes = self.positions(model)
        chooser = Chooser(model, sites, self.calibration, positions, self.progress, dtype=self.dtype)
        settled = chooser.settle(self.config)
        conversions = chooser.plan(settled.config)
        layers = [
            layer_report(c, output_error(c, statistics))
            for c, statistics in zip(conversions, self.calibration.sites, strict=True)
        ]
        notes += [*self.notes, *settled.notes, *doubts(self.calibration, sites)]
        if settled.excess is not None:
            count, length = self.calibration.held_out.shape
            own = f", {self.calibration.written} of them written by the model" if self.calibration.written else ""
            notes.append(f"Excess loss on {count} held-out windows of {length} tokens{own}: {settled.excess}.")
        notes += self.rewrite(model, conversions, positions)
        self.settled, self.conversions = settled.config, tuple(conversions)
        self.report = Report(tuple(layers), tuple(str(r) for r in refusals), self.dtype or sites[0].dtype, tuple(notes))
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
        if self.config.target == "ort-latent":
            require_sixteen_bits(sites, self.config, self.dtype)
            admitted = [paged_site(site) if isinstance(site, AttentionSite) else site for site in admitted]
        self.progress("checking weights", len(sites), len(sites))
        refusals = [r for r in admitted if isinstance(r, Refusal)]
        sites = [site for site in admitted if isinstance(site, AttentionSite)]
        partial = self.config.partial and self.config.layout == "plain"  # genai keeps one kind of cache
        if refusals and not (partial and sites):
            told = "\n".join(f"  {refusal}" for refusal in refusals)
            helps = sites and self.config.target == "mla-pass"
            hint = "; --partial (with --layout plain) converts the others and leaves these as they are" if helps else ""
            raise MlaPassError(
                f"{len(refusals)} of {len(admitted)} attention blocks cannot be converted{hint}:\n{told}"
            )
        if not sites:
            raise MlaPassError(
                "no attention found in this graph; expected a decoder with attention and a key/value cache"
            )
        return sites, refusals

    def observe(self, model: ir.Model, sites: Sequence[AttentionSite]) -> Calibration:
        """Run the model over the calibration text."""
        metric = chosen_metric(self.config)
        # ONNX Runtime's CPU has no bfloat16 arithmetic to write with.
        mute = sites[0].dtype == "bfloat16"
        if mute and self.written is not None and self.config.calibrate_self > 0:
            self.notes.append(
                "Calibrated on the given text alone: ONNX Runtime's CPU cannot run bfloat16 to write more."
            )
        windows, own = self.windows(tokens_needed(sites), 0.0 if mute else self.config.calibrate_self)

        def progress(done: int, total: int) -> None:
            self.progress(f"calibrating ({metric} metric)", done, total)

        if metric == "output":
            found = calibrate(sites, instrument(model, sites), windows, progress=progress)
        else:
            from mla_pass.pytorch.gradients import Gradients

            found = calibrate_fisher(sites, Gradients(model, sites), windows, progress=progress)
        return replace(found, written=own)

    def windows(self, needed: int, share: float) -> tuple[np.ndarray, int]:
        """Calibration text [n, T], a `share` of it the model's own, and how many of the windows to hold out are that.

        Raises MlaPassError when the text given has fewer than `needed` tokens, or the model cannot write.
        """
        context = self.config.calibrate_context
        count = -(-max(self.config.calibrate_tokens, needed) // context) + HELD_OUT
        own = 0 if self.written is None else round(share * count)
        wanted = max((count - own) * context, needed + context)  # one window of them may be held out
        given = cut_windows(self.token_ids(wanted), context, wanted, needed, self.origin)
        if self.written is None or own == 0:
            return given, 0
        try:
            return mixed(given, self.written(own, given.shape[1]))
        except MlaPassError as error:
            raise MlaPassError(f"{error}; or calibrate on the given text alone, with calibrate_self 0") from error

    def positions(self, model: ir.Model) -> tuple[int, list[str]]:
        """Rows of the rotary table, and what the user should know about it."""
        stated = model.metadata_props.get(MAX_POSITION_KEY)
        positions = self.config.max_positions or (int(stated) if stated else DEFAULT_MAX_POSITIONS)
        if stated or self.config.max_positions:
            return positions, []
        return positions, [f"The graph does not state its longest position; the rotary table has {positions} rows."]

    def rewrite(self, model: ir.Model, conversions: Sequence[Conversion], positions: int) -> list[str]:
        """Change the graph; returns what the user should know."""
        if self.config.target == "ort-latent":
            emitter = PagedEmitter(model, max_positions=positions)
            emitter.emit(conversions)
            model.metadata_props[MAX_POSITION_KEY] = str(positions)
            return emitter.notes(conversions)
        before = model.ir_version
        Emitter(model, max_positions=positions, shared_buffer=self.config.cache == "shared").emit(conversions)
        model.metadata_props[MAX_POSITION_KEY] = str(positions)
        if model.ir_version == before:
            return []
        return [f"The IR version was raised from {before} to {model.ir_version}: layers differ in their bodies."]


def chosen_metric(config: MlaConfig) -> Metric:
    """The metric to calibrate for. Raises MlaPassError when `fisher` is asked for without torch."""
    torch = find_spec("torch") is not None
    if config.metric == "fisher" and not torch:
        raise MlaPassError("metric 'fisher' needs torch: pip install 'mla-pass[torch]', or choose metric 'output'")
    return "fisher" if torch and config.metric != "output" else "output"


def check_calibration(calibration: Calibration, sites: Sequence[AttentionSite]) -> None:
    """Raises MlaPassError when the statistics are not of these sites."""
    widths, ours = [len(s.mean) for s in calibration.sites], [site.cache_width for site in sites]
    if widths != ours:
        raise MlaPassError(
            f"the statistics given are of {len(widths)} attention blocks that cache {sorted(set(widths))} numbers a "
            f"token, the model has {len(ours)} of {sorted(set(ours))}; calibrate this model anew"
        )


def doubts(calibration: Calibration, sites: Sequence[AttentionSite]) -> list[str]:
    """What is odd about the statistics, a sentence each."""
    told = []
    still = [
        site.name
        for site, s in zip(sites, calibration.sites, strict=True)
        if (np.diag(s.covariance) <= ROUNDING * s.mean**2).any()
    ]
    if still:
        told.append(
            f"{len(still)} blocks have key or value channels that never varied over the calibration text ({still[0]}, "
            "...); they were damped."
        )
    return told


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
