"""A model as a stock ``deepseek_v3`` checkpoint: transformers loads it without custom code and caches latents.

What such a checkpoint can say, and all else is refused: blocks like Llama's (two RMS norms, a dense gated SiLU MLP, no
scale on the embeddings), alike in every layer; attention without norms on queries and keys, cap or window; rotated
numbers of one head for all query heads, one per frequency of a geometric ladder; everything else un-rotated. Biases
on queries, keys, values and output are fine. It is decided by structure, tensor by tensor and site by site, and proved
before the folder gets its name (see `deepseek_proof`).

Measured, logits against the latents' attention in float64, over the largest: 1.4e-6 on SmolLM2-135M and 1.2e-6 on
Qwen2.5-0.5B (biases) in float32. Run in half precision the checkpoint is off by about as much as the original is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mla_pass.config import MlaConfig
from mla_pass.errors import MlaPassError
from mla_pass.export.layout import copy_companions, new_folder, quiet, require_free, require_libraries, umask
from mla_pass.export.tracing import LENGTH_DEPENDENT_ROPE, TOLERANCE, load, locate
from mla_pass.fold import LatentWeights
from mla_pass.parallel import each
from mla_pass.pytorch.deepseek_fold import INSTEAD, TargetScale, block_tensors, folded, prepared
from mla_pass.pytorch.deepseek_proof import logits, proof_ids, prove
from mla_pass.pytorch.deepseek_sizes import Sizes, choose_sizes, target_config
from mla_pass.site import AttentionSite, Refusal
from mla_pass.statistics import SiteStatistics

USUAL_MIX = 0.1
BIASES = (
    "The checkpoint has biases (attention_bias) on kv_a_proj_with_mqa and o_proj; a runtime whose deepseek_v3 block "
    "has none would leave them out and answer nonsense: use transformers, or check first."
)


@dataclass(frozen=True)
class DeepseekReport:
    """What was written. `rank` + 1 + `rope_dims` numbers a token and layer stand for `width` of the original.

    `stride`: every so-many-th frequency of the original has a rotated pair. `dtype` of the weights. `around`: largest
    difference of the logits, over the largest, when the original's attention runs in the written model; `error`: when
    the written model runs, against its latents' attention in float64. `cached`: numbers a token and layer that the
    installed transformers was seen to keep.
    """

    path: Path
    rank: int
    rope_dims: int
    stride: int
    width: int
    dtype: str
    around: float
    error: float
    cached: float
    notes: tuple[str, ...]

    def text(self) -> str:
        """For people."""
        row = self.rank + 1 + self.rope_dims
        lines = [
            f"{self.path}: deepseek_v3, {self.dtype}, {row} numbers a token and layer in place of {self.width} "
            f"({row / self.width:.3f}): latents of {self.rank}, a constant, and {self.rope_dims} rotated",
            f"logits within {self.error:.1e} of the latents' own attention in float64; around attention "
            f"{self.around:.1e}",
        ]
        return "\n".join([*lines, *self.notes])


def save_deepseek(
    sites: Sequence[AttentionSite | Refusal], statistics: Sequence[SiteStatistics], config: MlaConfig,
    source: str | Path, out: str | Path,
) -> DeepseekReport:  # fmt: skip
    """Write the model as a ``deepseek_v3`` folder `out`, in the type of its weights, tokenizer beside it.

    `sites` and `statistics` of all its layers, the blocks as found in the graph; `source` the Hugging Face folder that
    graph came from. Of `config` it takes `rank` (the constant channel comes on top) and `rope_dims`, or `budget`,
    and `metric_mix`; `rope_mode` must be `extend`.
    Raises MlaPassError when a deepseek_v3 checkpoint cannot say what the model computes, the sizes do not fit, or the
    proof fails; nothing is left at `out` then.
    """
    target = require_free(out)
    require_libraries("transformers", purpose="writing a deepseek_v3 checkpoint")
    check_request(config)
    known = by_layer(plain_blocks(sites), statistics)
    blocks = [site for site, _ in known]
    with quiet():
        folder = locate(str(source))
        original = load(folder, "float32").eval()
        dtype = stored_type(folder)
        check_config(folder, original.config, blocks)
        mix = USUAL_MIX if config.metric_mix is None else config.metric_mix
        layers = list(each(lambda pair: prepared(*pair, mix), known))
        sizes = choose_sizes(layers, blocks[0], original.config, config)
        latents = list(each(lambda p: folded(p, sizes.ladder, sizes.rank, sizes.rope_dims), layers))
        del layers, known
        written, scale = empty_model(original.config, blocks[0], sizes, latents[0].nope_dim, dtype)
        tensors = surroundings(folder, original.state_dict(), written.state_dict())
        wanted = logits(original, proof_ids(original))
        del original
        with new_folder(target) as partial:
            tensors |= attention_tensors(blocks, latents, scale, getattr(torch, dtype))
            write(written, tensors, folder, partial)
            del written, tensors
            proof = prove(partial, wanted, blocks, latents, dtype)
    notes = [BIASES]
    if proof.cached != sizes.rank + 1 + sizes.rope_dims:
        notes.append(
            f"The installed transformers keeps {proof.cached:g} numbers a token and layer, not the latents alone: it "
            "saves less memory than 5.23, or none."
        )
    return DeepseekReport(
        target, sizes.rank, sizes.rope_dims, sizes.ladder.stride, blocks[0].cache_width, dtype, proof.around,
        proof.error, proof.cached, tuple(notes),
    )  # fmt: skip


# ---- what can be said


def check_request(config: MlaConfig) -> None:
    """Raises MlaPassError when a configuration asks for what these checkpoints do not have."""
    for name, wanted in (("target", "mla-pass"), ("rope_mode", "extend"), ("cache_dtype", "same"), ("layout", "plain"),
                         ("max_loss", None)):  # fmt: skip
        if getattr(config, name) != wanted:
            raise MlaPassError(f"a deepseek_v3 checkpoint needs {name}={wanted!r}; got {getattr(config, name)!r}")
    if config.rank is not None and config.rope_dims is None:
        raise MlaPassError("a deepseek_v3 checkpoint of a given rank needs rope_dims, too; or give budget alone")


def plain_blocks(sites: Sequence[AttentionSite | Refusal]) -> list[AttentionSite]:
    """The blocks. Raises MlaPassError unless a deepseek_v3 layer can stand for each."""
    blocks = []
    for site in sites:
        if isinstance(site, Refusal):
            raise MlaPassError(f"a deepseek_v3 checkpoint needs every layer, and one cannot be read: {site}")
        for what, found in (
            ("a norm on its queries, keys or values", any(b.norm for b in (site.query, site.key, site.value))),
            ("capped logits", site.softcap != 0),
            (f"a window of {site.mask.window} tokens", site.mask.window != 0),
            ("a mask other than causal", site.mask.kind != "structured" or not site.mask.causal),
        ):
            if found:
                raise MlaPassError(f"{site.name} has {what}, which a deepseek_v3 block has not: {INSTEAD}")
        blocks.append(site)
    if not blocks:
        raise MlaPassError("there is no attention block to write; expected one for each layer of the model")
    for site in blocks[1:]:
        if alike(site) != alike(blocks[0]):
            raise MlaPassError(f"{site.name} differs in sizes, rope or biases from {blocks[0].name}, and a deepseek_v3 "
                               f"checkpoint has one shape for all layers: {INSTEAD}")  # fmt: skip
    return blocks


def by_layer(
    blocks: Sequence[AttentionSite], statistics: Sequence[SiteStatistics]
) -> list[tuple[AttentionSite, SiteStatistics]]:
    """Blocks and their statistics in order of the layers. Raises MlaPassError when the statistics are of others."""
    if [len(s.mean) for s in statistics] != [site.cache_width for site in blocks]:
        raise MlaPassError("the statistics are not of these attention blocks; calibrate this model anew")
    return sorted(zip(blocks, statistics, strict=True), key=lambda pair: pair[0].layer)


def alike(site: AttentionSite) -> tuple[Any, ...]:
    """What has to be the same in every layer."""
    rope, biased = site.rope, site.query.projection.bias is not None
    turning = tuple(rope.theta.tolist()), rope.attention_scaling
    return site.heads, site.kv_groups, site.head_dim, site.value_dim, biased, turning


def check_config(folder: Path, about: Any, blocks: Sequence[AttentionSite]) -> None:
    """Raises MlaPassError when the model's configuration has what a dense deepseek_v3 model has not."""
    layers = list(range(int(about.num_hidden_layers)))
    if [site.layer for site in blocks] != layers:
        raise MlaPassError(f"{folder} has {len(layers)} layers and {len(blocks)} attention blocks were given; expected "
                           "one for each: give the graph that was exported from this folder")  # fmt: skip
    activation = getattr(about, "hidden_act", None)
    if activation != "silu":
        raise MlaPassError(f"{folder} has the activation {activation!r} and deepseek_v3 runtimes have silu: {INSTEAD}")
    parameters = getattr(about, "rope_parameters", None)
    if not isinstance(parameters, Mapping) or "rope_theta" not in parameters:
        raise MlaPassError(f"{folder} tells no rope_theta for all layers, which deepseek_v3 needs: {INSTEAD}")
    if parameters.get("rope_type") in LENGTH_DEPENDENT_ROPE:
        raise MlaPassError(f"{folder} has rotary positions of the type {parameters['rope_type']!r}, which change with "
                           "the length of the text: set another rope_type in config.json")  # fmt: skip


def stored_type(folder: Path) -> str:
    """Element type of a checkpoint's weights, as its configuration names it."""
    from transformers import AutoConfig

    name = str(AutoConfig.from_pretrained(folder).dtype or "float32").removeprefix("torch.")
    if name not in TOLERANCE:
        raise MlaPassError(f"{folder} is stored as {name}; expected one of {', '.join(TOLERANCE)}")
    return name


# ---- the checkpoint


def empty_model(
    about: Any, site: AttentionSite, sizes: Sizes, nope_dim: int, dtype: str
) -> tuple[nn.Module, TargetScale]:  # fmt: skip
    """The target without numbers, and what it multiplies by."""
    from transformers import AutoModelForCausalLM

    config = target_config(about, site, sizes, nope_dim)
    config.dtype = dtype
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    table = type(model.model.rotary_emb)(config)
    return model, TargetScale(float(model.model.layers[0].self_attn.scaling), float(table.attention_scaling))


def surroundings(folder: Path, have: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All that is not attention, under the target's names and in its type.

    Raises MlaPassError when the original has other tensors, or of other shapes, than the target.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in have.items():
        if name.endswith(".mlp.gate_up_proj.weight"):
            parts = zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True)
            found |= {name.replace("gate_up_proj", part): half for part, half in parts}
        elif ".self_attn." not in name:
            found[name] = tensor
    wanted = {name: tensor.shape for name, tensor in want.items() if ".self_attn." not in name}
    shapes = {name: tensor.shape for name, tensor in found.items()}
    for kind, names in (
        ("lacks", wanted.keys() - shapes.keys()),
        ("has, which that has not,", shapes.keys() - wanted.keys()),
        ("has in another shape", {name for name in wanted.keys() & shapes.keys() if wanted[name] != shapes[name]}),
    ):
        if names:
            raise MlaPassError(f"{folder} is no dense model like deepseek_v3: it {kind} {len(names)} tensors "
                               f"({', '.join(sorted(names)[:2])}): {INSTEAD}")  # fmt: skip
    return {name: tensor.to(want[name].dtype).contiguous() for name, tensor in found.items()}


def attention_tensors(
    blocks: Sequence[AttentionSite], latents: Sequence[LatentWeights], scale: TargetScale, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The attention of all layers under the target's names; folded in float64, cast once."""
    return {
        f"model.layers.{site.layer}.self_attn.{name}": torch.from_numpy(np.ascontiguousarray(array)).to(dtype)
        for site, weights in zip(blocks, latents, strict=True)
        for name, array in block_tensors(site, weights, scale).items()
    }


def write(model: Any, tensors: Mapping[str, Tensor], source: Path, folder: Path) -> None:
    """Fill the empty model and save it, with what else the original's folder holds."""
    from safetensors import SafetensorError

    model.load_state_dict(dict(tensors), assign=True)
    model.tie_weights()
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:  # its own class, also for a full disk
        raise OSError(str(error)) from error
    copy_companions(source, folder)
    model.config.save_pretrained(folder)  # not the original's
    for file in folder.glob("*.safetensors"):  # safetensors makes them private
        file.chmod(0o666 & ~umask())
