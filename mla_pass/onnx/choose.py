"""From calibration to conversions, and the choices that are measured rather than predicted.

Ranks, rope dims, bands and layers are chosen by predicted loss (`mla_pass.budget`). How much the prediction is to be
trusted (`metric_mix`), and how small a cache may be for a given loss (`max_loss`), is measured: conversions are made in
memory and run over text that calibration held out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from mla_pass.budget import Split, choose_splits
from mla_pass.config import CacheDtype, MlaConfig
from mla_pass.errors import BudgetTooSmall, LossUnreachable, MlaPassError
from mla_pass.fold import Geometry, LatentWeights, Prepared, Recipe, fold, prepare_layouts, without_key_mean
from mla_pass.onnx.absorb import choose_absorption
from mla_pass.onnx.emit import Conversion, Emitter
from mla_pass.onnx.probe import Excess, Probe, can_probe
from mla_pass.parallel import each
from mla_pass.patterns import find_sites
from mla_pass.site import AttentionSite
from mla_pass.statistics import Calibration
from mla_pass.storage import RowFormat, row_format

Progress = Callable[[str, int, int], None]
USUAL_MIX = 0.1
MIXES = (0.01, 0.1, 0.3, 1.0)
"""Weights of the balanced identity to choose from."""
BUDGETS = tuple(i / 16 for i in range(1, 17))
"""Cache sizes that a largest loss is looked for among."""
PRICES = tuple(10.0**-e for e in (-3, 0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4))
"""Prices of arithmetic, in units of a pair's mean energy: from no block rotation at all to hardly any error."""
CACHE_DTYPES: tuple[CacheDtype, ...] = ("same", "int8")
"""Types of the latents that `auto` chooses between."""
UNLIKELY_LOSS = 6.0
"""Nats per token beyond which a text is hardly one that the model was trained for: a perplexity of 400."""
OVERFIT_RATIO, OVERFIT_FLOOR = 2.0, 0.01
"""A held-out excess this many times that of seen text, beyond its own error and this many nats, is told."""


@dataclass(frozen=True)
class Settled:
    """The configuration with every open choice made, what was measured on held-out text with it (None where nothing
    can be run), and what the user should know."""

    config: MlaConfig
    excess: Excess | None
    notes: tuple[str, ...]


class Chooser:
    """Plans conversions of one model's `sites` from one calibration."""

    def __init__(
        self, model: ir.Model, sites: Sequence[AttentionSite], calibration: Calibration, positions: int,
        progress: Progress, *, dtype: str | None = None,
    ) -> None:  # fmt: skip
        """`positions`: rows of the rotary table in models that are tried out. `dtype`: what the model is stored in,
        where that is not what its graph computes in."""
        self.model, self.sites, self.calibration = model, sites, calibration
        self.positions, self.progress, self.dtype = positions, progress, dtype
        self._probe: Probe | None = None
        self._tried: dict[MlaConfig, Excess] = {}
        self._last: tuple[MlaConfig, list[Conversion]] | None = None
        self._model: tuple[MlaConfig, ir.Model] | None = None

    def plan(self, config: MlaConfig) -> list[Conversion]:
        """Fold every site as `config` says, its mix given or the usual one."""
        if self._last is not None and self._last[0] == config:
            return self._last[1]
        formats = [row_format(self.dtype or site.dtype, config) for site in self.sites]
        splits = choose_splits(self.options(config), formats, config)
        self.progress("folding", 0, len(splits))
        conversions = []
        for site, row, weights in zip(self.sites, formats, each(folded, splits), strict=True):
            conversions.append(conversion_of(site, weights, row, config))
            self.progress("folding", len(conversions), len(splits))
        self._last = config, conversions
        return conversions

    def options(self, config: MlaConfig) -> list[list[Prepared]]:
        """The band layouts of every site."""
        wanted = recipes(config)

        def layouts(i: int) -> list[Prepared]:
            site = self.sites[i]
            per_group = site.heads // site.kv_groups
            geometry = Geometry(
                site.kv_groups, per_group, site.head_dim, site.value_dim, site.rope, site.softcap > 0
            )  # fmt: skip
            return prepare_layouts(geometry, self.calibration.sites[i], wanted)

        return list(each(layouts, range(len(self.sites))))

    # ---- measured choices

    def settle(self, config: MlaConfig) -> Settled:
        """Make the choices that `config` leaves open. Raises MlaPassError when no cache keeps within `max_loss`."""
        notes: list[str] = []
        if not can_probe(self.model, self.sites) or len(self.calibration.held_out) == 0:
            for asked, name, instead in (
                (config.max_loss is not None, "max_loss", "a budget"),
                (config.cache_dtype == "auto", "cache_dtype auto", "a type"),
            ):
                if asked:
                    raise MlaPassError(
                        f"{name} needs conversions that ONNX Runtime's CPU can run from memory, float32 or float16 "
                        f"and below 2 GB of attention weights, and held-out text; give {instead} instead"
                    )
            if config.metric_mix is None:
                notes.append(f"metric_mix is the usual {USUAL_MIX}: conversions cannot be tried out here.")
            return Settled(mixed(config), None, tuple(notes))
        if config.cache_dtype == "auto":
            config = self.best_dtype(config)
        elif config.max_loss is not None:
            config = self.smallest(config)
        if config.metric_mix is None:
            config = self.best_mix(config)
        excess = self.excess(config)
        return Settled(config, excess, (*notes, *self.doubts(config, excess)))

    def doubts(self, config: MlaConfig, excess: Excess) -> list[str]:
        """What the losses say against the calibration text, a sentence each."""
        assert self._probe is not None  # excess was measured
        given = self._probe.before[: len(self._probe.before) - self.calibration.written]
        told, before = [], float(given.mean()) if len(given) else 0.0  # the model's own text needs no doubt
        if before > UNLIKELY_LOSS:
            told.append(
                f"The model itself loses {before:.1f} nats per token on the calibration text: is it in a language and "
                "format that the model knows?"
            )
        on_seen = Probe(self.model, self.calibration.seen).excess(self.converted(config))
        if excess.mean > OVERFIT_RATIO * max(on_seen.mean, 0.0) + 3 * (excess.stderr or 0.0) + OVERFIT_FLOOR:
            told.append(
                f"On text that calibration saw the excess loss is {on_seen}, on text it did not {excess}: the "
                "calibration text is too short or too uneven; give more of it."
            )
        return told

    def best_dtype(self, config: MlaConfig) -> MlaConfig:
        """The type of the latents that loses least at equal bytes or, under a largest loss, takes fewest bytes."""
        candidates = [replace(config, cache_dtype=dtype) for dtype in CACHE_DTYPES]
        if config.max_loss is None:
            tried = []
            for done, candidate in enumerate(candidates):
                self.progress("choosing the cache's type on held-out text", done, len(candidates))
                tried.append((self.excess(mixed(candidate)).mean, done))
            self.progress("choosing the cache's type on held-out text", len(candidates), len(candidates))
            return candidates[min(tried)[1]]
        sized, unreachable = [], []
        for candidate in candidates:
            try:
                sized.append(self.smallest(candidate))
            except LossUnreachable as error:
                unreachable.append(error)
        if not sized:
            raise unreachable[0]  # the model's own type loses least at full size
        return min(sized, key=lambda each: each.budget)

    def best_mix(self, config: MlaConfig) -> MlaConfig:
        """The mix that loses least on held-out text: from the usual one on to either side, as long as loss falls."""
        if config.rank is None and config.budget == 1.0:  # nothing is cut, so that no metric matters
            return replace(config, metric_mix=USUAL_MIX)
        losses: dict[int, float] = {}

        def loss(place: int) -> float:
            if place not in losses:
                self.progress("choosing the metric on held-out text", len(losses), len(MIXES))
                losses[place] = self.excess(replace(config, metric_mix=MIXES[place])).mean
            return losses[place]

        best = MIXES.index(USUAL_MIX)
        for step in (-1, 1):
            while 0 <= best + step < len(MIXES) and loss(best + step) < loss(best):
                best += step
        self.progress("choosing the metric on held-out text", len(MIXES), len(MIXES))
        return replace(config, metric_mix=MIXES[best])

    def smallest(self, config: MlaConfig) -> MlaConfig:
        """The least budget within `max_loss`, by bisection: loss falls with size."""
        assert config.max_loss is not None
        limit, candidates = config.max_loss, [replace(config, budget=b, max_loss=None) for b in BUDGETS]
        low, high = -1, len(candidates) - 1
        best = self.excess(mixed(candidates[high]))
        if best.mean > limit:
            raise LossUnreachable(
                f"no cache keeps the loss within {limit} nats per token; the full size reaches {best}"
            )
        while high - low > 1:
            middle = (low + high) // 2
            self.progress("looking for the smallest cache", len(BUDGETS) - (high - low), len(BUDGETS))
            try:
                fits = self.excess(mixed(candidates[middle])).mean <= limit
            except BudgetTooSmall:
                fits = False
            low, high = (low, middle) if fits else (middle, high)
        self.progress("looking for the smallest cache", len(BUDGETS), len(BUDGETS))
        return candidates[high]

    def excess(self, config: MlaConfig) -> Excess:
        """The measured loss of a conversion."""
        if config not in self._tried:
            if self._probe is None:
                self._probe = Probe(self.model, self.calibration.held_out)
            self._tried[config] = self._probe.excess(self.converted(config))
        return self._tried[config]

    def converted(self, config: MlaConfig) -> ir.Model:
        """A converted copy of the model; the last one is kept."""
        if self._model is None or self._model[0] != config:
            self._model = None  # not two at once
            copy = self.model.clone()
            sites = {site.name: site for site in find_sites(copy) if isinstance(site, AttentionSite)}
            moved = [replace(conversion, site=sites[conversion.site.name]) for conversion in self.plan(config)]
            Emitter(copy, max_positions=self.positions, shared_buffer=False).emit(moved)
            self._model = config, copy
        return self._model[1]


def folded(split: Split) -> LatentWeights:
    """The weights of one split."""
    return fold(split.prepared, split.rank, split.rope_dims, split.key_rank)


def conversion_of(site: AttentionSite, weights: LatentWeights, row: RowFormat, config: MlaConfig) -> Conversion:
    """A site with its weights as the target reads them."""
    paged = config.target == "ort-latent"
    weights = without_key_mean(weights) if paged else weights
    return Conversion(site, weights, choose_absorption(site, weights, config.absorb, composed=paged), row)


def mixed(config: MlaConfig) -> MlaConfig:
    """The configuration with a mix to try it with."""
    return config if config.metric_mix is not None else replace(config, metric_mix=USUAL_MIX)


def recipes(config: MlaConfig) -> list[Recipe]:
    """The band layouts to choose from: one where blocks and order are given, else a point of the trade a price."""
    mix = USUAL_MIX if config.metric_mix is None else config.metric_mix
    orders = (0, 1) if config.block_order is None else (config.block_order,)
    if config.rope_mode != "block":
        return [Recipe(rope_mode=config.rope_mode, metric_mix=mix)]
    if config.finest_block is not None:
        return [
            Recipe(
                finest_block=config.finest_block, block_order=order, band_angle=config.band_angle, metric_mix=mix,
                turn_all=config.turn_all,
            )
            for order in orders
        ]  # fmt: skip
    return [
        Recipe(block_order=order, band_price=price, metric_mix=mix, turn_all=config.turn_all)
        for order in orders
        for price in PRICES
    ]
