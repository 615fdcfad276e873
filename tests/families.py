"""Tiny random models, one for each shape of attention the project reads, and their exports.

Freshly initialised attention is near uniform and every norm is one: wrong positions, masks or scales would hardly
show. So `_liven` draws the weights anew, with query and key projections large enough for peaked attention.
"""

import atexit
import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

VOCAB = 97
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
SLIDING = "sliding_attention"
FULL = "full_attention"


def _build(model_type: str, *, seed: int = 0, **changes: Any) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **{**SHAPE, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _liven(model)
    model.generation_config.max_length = SHAPE["max_position_embeddings"]
    return model.eval()


def _liven(model: Any) -> None:
    import torch

    tied = model.config.tie_word_embeddings
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:  # norms around their neutral value, biases around zero, neither equal anywhere
                weight.add_(torch.randn_like(weight) * 0.3)
            elif "embed_tokens" in name:
                weight.normal_(0, 0.3 if tied else 1.0)
            else:
                gain = 2.0 if any(part in name for part in ("q_proj", "k_proj", "qkv_proj")) else 1.0
                weight.normal_(0, gain / weight.shape[-1] ** 0.5)


def llama() -> Any:
    return _build("llama")


def llama_mha() -> Any:
    return _build("llama", num_key_value_heads=4)


def llama_mqa() -> Any:
    return _build("llama", num_key_value_heads=1)


def llama_tied() -> Any:
    """One matrix embeds tokens and scores them; more tokens than elsewhere, as exporters copy small ones."""
    return _build("llama", vocab_size=257, tie_word_embeddings=True)


def llama3() -> Any:
    """Rotary frequencies scaled by wavelength; the original length is short so that all three bands occur."""
    return _build(
        "llama",
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 1000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    )


def llama_yarn() -> Any:
    """Frequencies blended by a ramp, and cos and sin scaled by an attention factor other than one."""
    return _build(
        "llama",
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    )


def qwen2() -> Any:
    return _build("qwen2")


def qwen3() -> Any:
    return _build("qwen3")


def mistral() -> Any:
    """A window of 8 tokens in every layer."""
    return _build("mistral", sliding_window=8)


def mixtral() -> Any:
    return _build("mixtral", num_local_experts=4, num_experts_per_tok=2, sliding_window=None)


def gemma() -> Any:
    return _build("gemma", hidden_act="gelu_pytorch_tanh", tie_word_embeddings=True)


def gemma2() -> Any:
    """Capped attention scores and logits, a window of 8 tokens in every other layer."""
    return _build(
        "gemma2",
        num_hidden_layers=4,
        sliding_window=8,
        layer_types=[SLIDING, FULL] * 2,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=8.0,
        query_pre_attn_scalar=24,
        tie_word_embeddings=True,
    )


def gemma3() -> Any:
    """Layers with a window and positions of their own between layers that see all, norms on queries and keys."""
    return _build(
        "gemma3_text",
        num_hidden_layers=4,
        sliding_window=8,
        layer_types=[SLIDING, SLIDING, FULL, SLIDING],
        rope_parameters={
            FULL: {"rope_type": "linear", "factor": 4.0, "rope_theta": 100000.0},
            SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
        },
        query_pre_attn_scalar=24,
        tie_word_embeddings=True,
    )


def phi3() -> Any:
    """Queries, keys and values from one packed projection."""
    return _build("phi3", sliding_window=None)


def phi3_partial() -> Any:
    """Packed as well, and only half of each head rotates."""
    return _build(
        "phi3",
        sliding_window=None,
        partial_rotary_factor=0.5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    )


FAMILIES: dict[str, Callable[[], Any]] = {
    make.__name__: make
    for make in (
        llama, llama_mha, llama_mqa, llama_tied, llama3, llama_yarn, qwen2, qwen3, mistral, mixtral, gemma, gemma2,
        gemma3, phi3, phi3_partial,
    )
}  # fmt: skip


@functools.cache
def _session_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="mla_pass_families_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def exported(family: str, opset: int = 18, dtype: str = "float32") -> Path:
    """The exported folder of `FAMILIES[family]()`, made once a test session. Read it, never write to it."""
    return _exported(family, opset, dtype)


@functools.cache
def _exported(family: str, opset: int, dtype: str) -> Path:
    from mla_pass.export.hf import export_hf

    return export_hf(FAMILIES[family](), _session_folder() / f"{family}-{opset}-{dtype}", dtype=dtype, opset=opset)
