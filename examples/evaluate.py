"""A converted model in lm-evaluation-harness, unchanged: on a text of yours, or on any of the harness's tasks.

    pip install "lm_eval[hf]"
    python examples/evaluate.py MODEL --text book.txt [--original MODEL]
    python examples/evaluate.py MODEL --tasks niah_single_1 --lengths 4096 [--limit 20]    # also wonderwords, nltk
    python examples/evaluate.py MODEL --tasks lambada_openai hellaswag [--limit 100]

MODEL is a folder that mla-retrofit wrote, or any other model folder of transformers; with --original both are run and
stand side by side. A text is cut at its blank lines into documents of some 4,000 characters and needs no network, nor
does niah_single_1, which makes its haystacks itself; most of the harness's tasks fetch their data.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

import mla_pass.pytorch.modeling  # noqa: F401  registers the format of converted folders

DOCUMENT = 4000
METRICS = ("word_perplexity", "byte_perplexity", "bits_per_byte")


def documents(text: str, length: int = DOCUMENT) -> Iterator[str]:
    """Paragraphs, joined until they have so many characters."""
    held: list[str] = []
    for paragraph in filter(str.strip, text.strip().split("\n\n")):
        held.append(paragraph)
        if sum(map(len, held)) >= length:
            yield "\n\n".join(held)
            held.clear()
    if held:
        yield "\n\n".join(held)


def text_task(text: Path, folder: Path) -> dict[str, Any]:
    """A perplexity task of the harness on a local file; `folder` takes its data."""
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents(text.read_text("utf-8"))))
    return {
        "task": text.stem,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [
            {"metric": name, "aggregation": "bits_per_byte" if name == "bits_per_byte" else "weighted_perplexity",
             "higher_is_better": False} for name in METRICS
        ],
    }  # fmt: skip


def evaluate(folder: str, tasks: list[Any], arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What the harness measures: by task, then by metric."""
    model = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(folder), tokenizer=AutoTokenizer.from_pretrained(folder),
        batch_size=arguments.batch_size,
    )  # fmt: skip
    asked = {"pretrained": folder, **({"max_seq_lengths": arguments.lengths} if arguments.lengths else {})}
    measured = lm_eval.simple_evaluate(model=model, tasks=tasks, limit=arguments.limit, metadata=asked)
    results: dict[str, dict[str, Any]] = measured["results"]
    return results


def main() -> None:
    """Command line of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a converted model")
    parser.add_argument("--original", help="folder of the model it was made from, to stand beside it")
    parser.add_argument("--text", type=Path, help="UTF-8 text to measure perplexity on")
    parser.add_argument("--tasks", nargs="*", default=[], help="tasks of the harness")
    parser.add_argument("--lengths", type=int, nargs="*", help="tokens of the texts that a task makes itself")
    parser.add_argument("--limit", type=int, help="documents of each task (all)")
    parser.add_argument("--batch-size", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.text is None and not arguments.tasks:
        parser.error("give a --text, --tasks, or both")
    with tempfile.TemporaryDirectory() as place:
        own = [] if arguments.text is None else [text_task(arguments.text, Path(place))]
        for folder in filter(None, (arguments.original, arguments.model)):
            for task, measured in evaluate(folder, [*own, *arguments.tasks], arguments).items():
                numbers = {name: value for name, value in measured.items() if isinstance(value, float)}
                print(folder, task, *(f"{name.removesuffix(',none')} {value:.4f}" for name, value in numbers.items()))


if __name__ == "__main__":
    main()
