"""Healing of a Hugging Face checkpoint: both models as transformers loads them, trained weights into their files."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.modeling_outputs import MoeModelOutputWithPast

from mla_pass.convert import SELF_BATCH, read_text
from mla_pass.errors import MlaPassError
from mla_pass.export.layout import copy_companions, quiet
from mla_pass.export.tracing import load, settle_attention
from mla_pass.healing.subject import Subject, Trainable
from mla_pass.onnx.perplexity import sample_rows
from mla_pass.onnx.text import load_tokenizer
from mla_pass.pytorch.cache import LatentRows
from mla_pass.pytorch.folder import CACHE_FILE, INDEX_FILE, SHIM_FILE, check, open_weights, read_config, weight_files
from mla_pass.pytorch.modeling import KEY, MODEL_TYPE
from mla_pass.pytorch.spec import stored_dtype
from mla_pass.storage import CODED

_STAY = {"key", "value", "query_norm", "key_norm", "value_norm"}
"""Parts of a `LatentAttention` that are the original's: rows behind a norm are encoded from its keys and values."""
_LEFT_OUT = {
    CACHE_FILE: "it serves the unmodified original, whose query and output projections were not trained",
    "onnx": "it holds the conversion as it was; heal it by itself, against an ONNX export of the original",
}


class CheckpointSubject(Subject):
    """The folders of an original and a converted checkpoint."""

    def __init__(self, original: Path, converted: Path, device: str) -> None:
        """Raises MlaPassError when one cannot be read, or the second is not converted."""
        told = read_config(converted)
        if told.get("model_type") != MODEL_TYPE:
            raise MlaPassError(
                f"{converted} is no converted checkpoint ({KEY!r} in config.json); give a folder that mla-pass convert "
                "wrote"
            )
        self._folders = original, converted
        with quiet():
            models = [loaded(folder, device) for folder in self._folders]
        self._author = models[0]
        trainable = find_trainable(models[1])
        self._stored = stored_types(converted, trainable.names)
        self._settled: dict[str, Tensor] = {}
        limit = getattr(models[0].config.get_text_config(), "max_position_embeddings", None)
        super().__init__(
            ModelPredictor(models[0]), ModelPredictor(models[1]), trainable,
            tuple(n for n in (limit, models[1].config.mla["max_positions"]) if n is not None), str(original), converted,
            tuple(f"{name} was left out: {why}." for name, why in _LEFT_OUT.items() if (converted / name).exists()),
        )  # fmt: skip

    def sources(self) -> Iterator[Path]:
        """See `Subject.sources`."""
        for folder in self._folders:
            yield folder / "config.json"
            yield from weight_files(folder)

    def tokens(self, text: Path) -> tuple[np.ndarray, int | None]:
        """See `Subject.tokens`."""
        return read_text(text, self._folders[0]), load_tokenizer(self._folders[0]).leading_bos

    def written(self, rows: int, length: int) -> np.ndarray:
        """See `Subject.written`."""
        return sample_rows(
            lambda batch: Writer(self._author), rows, length=length, batch=SELF_BATCH,
            folder=self._folders[0], vocab=self.teacher.vocab,
        )  # fmt: skip

    def settle(self, name: str, weight: Tensor) -> Tensor:
        """See `Subject.settle`."""
        self._settled[name] = weight.detach().cpu().to(self._stored[name])
        return self._settled[name].float()

    def write(self, folder: Path) -> None:
        """See `Subject.write`. Files without a trained weight are copied as they are."""
        source = self._folders[1]
        copy_companions(source, folder)
        for name in (INDEX_FILE, SHIM_FILE):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        for path in weight_files(source):
            replace_weights(path, self._settled, folder / path.name)
        check(folder)


class ModelPredictor:
    """See `mla_pass.healing.subject.Predictor`."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.parameters = dict(model.named_parameters())
        self._given = _Given()
        # The model once more, all but its body: what follows a hidden state is the family's own.
        self._head = copy.copy(model)
        self._head._modules = {**model._modules, model.base_model_prefix: self._given}
        with torch.no_grad():
            self.vocab = self.logits(self.hidden(torch.zeros(1, 1, dtype=torch.int64, device=model.device))).shape[-1]

    def hidden(self, ids: Tensor) -> Tensor:
        """See `Predictor.hidden`."""
        body = self.model.base_model
        if not hasattr(self.model, "flat_cache"):
            return body(input_ids=ids, use_cache=False).last_hidden_state
        cache = self.model.flat_cache(no_rows(self.model, *ids.shape[:1]))
        return body(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Predictor.logits`."""
        self._given.hidden = hidden
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        return self._head(input_ids=ids).logits


class _Given(nn.Module):
    """Stands where a model's body stands, and hands on a hidden state that is known."""

    hidden: Tensor

    def forward(self, **_: Any) -> MoeModelOutputWithPast:
        """Whatever it is called with."""
        return MoeModelOutputWithPast(last_hidden_state=self.hidden)


class Writer:
    """A model that is given a token a row at a time; see `mla_pass.onnx.perplexity.Steps`."""

    def __init__(self, model: Any) -> None:
        self._model, self._past = model, None

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """Logits [B, vocab] behind tokens [B]."""
        ids = torch.from_numpy(np.asarray(tokens, np.int64))[:, None].to(self._model.device)
        with torch.no_grad():
            found = self._model(input_ids=ids, past_key_values=self._past, use_cache=True)
        self._past = found.past_key_values
        return found.logits[:, -1].float().cpu().numpy()


def loaded(folder: Path, device: str) -> Any:
    """The model of a folder in float32, as it predicts. Raises MlaPassError when there is none that can be read."""
    model = load(folder, "float32").eval().requires_grad_(False)
    settle_attention(model)
    return model.to(device)


def find_trainable(model: Any) -> Trainable:
    """Parameters of every latent attention but for those that are the original's own, `_STAY`."""
    names, staggered = [], set()
    for block in model.latent_blocks:
        inside = dict(model.get_submodule(block.spec.name).named_parameters())
        names += [f"{block.spec.name}.{name}" for name in inside if name.partition(".")[0] not in _STAY]
        if block.key_up:
            staggered.add(f"{block.spec.name}.key_up")
    return Trainable(tuple(names), staggered=frozenset(staggered))


def no_rows(model: Any, batch: int) -> list[Tensor]:
    """An empty cache: latents and rotated parts in turn. Rows are float32, or of 8 bits where they are: the rounding of
    16 bits is less than a gradient tells."""
    past = []
    for block in model.latent_blocks:
        kinds = block.spec.latent_dtype, block.spec.rope_dtype
        for (width, _), kind in zip(LatentRows.widths(block.operator, torch.float32), kinds, strict=True):
            dtype = stored_dtype(kind, torch.float32) if kind in CODED else torch.float32
            past.append(torch.zeros(batch, 1, 0, width, dtype=dtype, device=model.device))
    return past


# ---- files


def stored_types(folder: Path, names: Collection[str]) -> dict[str, torch.dtype]:
    """Element types of some weights. Raises MlaPassError when a file cannot be read, or none holds one of them."""
    found: dict[str, torch.dtype] = {}
    for path in weight_files(folder):
        with open_weights(path) as file:
            found |= {name: file.get_tensor(name).dtype for name in names if name in file.keys()}  # noqa: SIM118
    lacking = [name for name in names if name not in found]
    if lacking:
        raise MlaPassError(f"the files in {folder} hold no {lacking[0]}; convert the model again")
    return found


def replace_weights(path: Path, weights: Mapping[str, Tensor], target: Path) -> None:
    """Copy a file of weights, some of them in place of its own. Raises MlaPassError when it cannot be read."""
    with open_weights(path) as file:
        names = list(file.keys())
        if weights.keys().isdisjoint(names):
            shutil.copyfile(path, target)
            return
        tensors = {name: weights[name] if name in weights else file.get_tensor(name) for name in names}
        save_file(tensors, target, metadata=file.metadata())
