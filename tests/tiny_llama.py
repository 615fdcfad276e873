"""A tiny random llama, in torch and as an ONNX folder with a flat growing cache, made with torch's own exporter."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def make(folder: Path) -> Any:
    """Writes ``folder/model.onnx`` and the configuration; returns the torch model (float32)."""
    import torch
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()

    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, past: Any) -> Any:
            result = self.model(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                past_key_values=DynamicCache(past), use_cache=True,
            )  # fmt: skip
            return result.logits, [(layer.keys, layer.values) for layer in result.past_key_values.layers]

    batch, new, held, dynamic = 3, 5, 4, torch.export.Dim.DYNAMIC
    tokens = torch.ones(batch, new, dtype=torch.int64)
    past = [tuple(torch.zeros(batch, 2, held, 8) for _ in range(2)) for _ in range(2)]
    kinds = [f"{layer}.{kind}" for layer in range(2) for kind in ("key", "value")]
    program = torch.onnx.export(
        Flat().eval(),
        (tokens, torch.ones(batch, held + new, dtype=torch.int64), held + tokens.cumsum(1) - 1, past),
        dynamo=True,
        opset_version=18,
        verbose=False,
        input_names=["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{kind}" for kind in kinds)],
        output_names=["logits", *(f"present.{kind}" for kind in kinds)],
        dynamic_shapes=(*({0: dynamic, 1: dynamic} for _ in range(3)), [({0: dynamic, 2: dynamic},) * 2] * 2),
    )
    program.save(folder / "model.onnx", external_data=True)
    config.save_pretrained(folder)
    return model
