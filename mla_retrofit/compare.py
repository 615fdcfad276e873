"""An original and its conversion side by side: what they write, and how far their logits differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from mla_pass.errors import MlaPassError
from mla_pass.export.layout import quiet
from mla_pass.onnx.verify import Agreement, verify

if TYPE_CHECKING:
    from mla_pass.onnx.session import ModelSession

PROMPT = "Tell me a short story about a robot learning to be human."
NEW_TOKENS = 64


@dataclass(frozen=True)
class Comparison:
    """Greedy continuations of one prompt, and how the two models' logits agree over the original's."""

    original: str
    converted: str
    agreement: Agreement

    def text(self) -> str:
        """For people."""
        return (
            f"The original writes:\n{self.original}\n\nThe converted model writes:\n{self.converted}\n\n"
            f"Over the original's text:\n{self.agreement.text()}"
        )


@dataclass(frozen=True)
class Logits:
    """A torch model as `verify` takes one."""

    model: Any

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Float32 [batch, tokens, vocabulary]."""
        import torch

        with torch.no_grad():
            return self.model(torch.from_numpy(ids).to(self.model.device)).logits.float().cpu().numpy()


def compare(
    original: Any, converted: Any, tokenizer: Any, *, prompt: str = PROMPT, new_tokens: int = NEW_TOKENS
) -> Comparison:
    """Let both continue `prompt`. Raises MlaPassError when it leaves no room for more tokens."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    limit = getattr(original.config.get_text_config(), "max_position_embeddings", None) or new_tokens + ids.shape[1]
    room = min(new_tokens, limit - ids.shape[1])
    if ids.shape[1] == 0 or room < 1:
        raise MlaPassError(f"a prompt of {ids.shape[1]} tokens cannot be continued within {limit}; give another")
    theirs, ours = (continued(model, ids, room, tokenizer) for model in (original, converted))
    before, after = (cast("ModelSession", Logits(model)) for model in (original, converted))
    agreement = verify(before, after, theirs, context=len(theirs))
    text, other = (tokenizer.decode(row, skip_special_tokens=True) for row in (theirs, ours))
    return Comparison(text, other, agreement)


def continued(model: Any, ids: Any, room: int, tokenizer: Any) -> np.ndarray:
    """Prompt and greedy continuation, token ids [N]."""
    import torch

    ids = ids.to(model.device)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    with quiet(), torch.no_grad():
        row = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=room, pad_token_id=pad
        )
    return row[0].cpu().numpy()
