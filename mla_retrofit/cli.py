"""The `mla-retrofit` command, with the guide's words and a few of ours.

The report goes to stdout, progress to stderr. Exit codes: 0 done, 1 a `MlaPassError` told in one sentence, 2 wrong
arguments, 130 interrupted.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import mla_pass
from mla_pass.config import MlaConfig
from mla_pass.console import told
from mla_pass.export.layout import FORMATS
from mla_pass.progress import Progress
from mla_retrofit.api import retrofit
from mla_retrofit.compare import PROMPT, compare
from mla_retrofit.request import DTYPES, Request
from mla_retrofit.sizes import DEFAULT_BUDGET, ROPE_MODES


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.budget is not None and (arguments.num_kv_heads is not None or arguments.head_dim is not None):
        parser.error("--budget excludes --num-kv-heads and --head-dim")
    return told("mla-retrofit", lambda: _run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mla-retrofit", description="Convert a Hugging Face model to multi-head latent attention."
    )
    add = parser.add_argument
    add("--version", action="version", version=f"mla-retrofit {mla_pass.__version__}")
    add("--model", required=True, help="folder of a Hugging Face checkpoint, or its id where a hub is reachable")
    add("--output-dir", type=Path, metavar="DIR", help="folder to write, new or empty (default: ./NAME-mla)")
    add("--num-kv-heads", type=int, metavar="N", help="times --head-dim: the width of the latent")
    add("--head-dim", type=int, metavar="N", help="see --num-kv-heads; either alone is completed by the model's own")
    add("--rope-mode", choices=ROPE_MODES, help="take the rotation off most of a key, or keep all of it rotated; "
        "without this option keys turn block by block, which loses least")  # fmt: skip
    add("--absorb", action="store_true", help="fold the up-projections wherever possible, not only where it pays")
    add("--flash-attn", action="store_true", help="test with transformers' flash attention 2")
    add("--test", action="store_true", help="let the original and the converted model write, and compare their logits")
    add("--test-prompt", default=PROMPT, metavar="TEXT", help="what --test lets them continue")
    add("--dtype", choices=DTYPES, help="type of the checkpoint's weights (the original's)")
    add("--calibrate", default="self", metavar="self|FILE.txt|IDS.npy",
        help="text to fit the latents to; `self`, the default, lets the model write it")  # fmt: skip
    add("--calibrate-tokens", type=int, default=MlaConfig().calibrate_tokens, metavar="N", help="of it (%(default)s)")
    add("--budget", type=float, metavar="X",
        help=f"instead of the width of the latent: the new cache's share of the old ({DEFAULT_BUDGET})")  # fmt: skip
    add("--format", choices=FORMATS, default="hf", help="what to write: a checkpoint, an ONNX folder, or both")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    out = arguments.output_dir or Path(f"{Path(arguments.model).absolute().name}-mla")
    words = ("num_kv_heads", "head_dim", "rope_mode", "absorb", "flash_attn", "dtype", "budget", "format")
    request = Request(
        arguments.model, out, loaded=arguments.test,
        calibrate=arguments.calibrate if arguments.calibrate == "self" else Path(arguments.calibrate),
        options={"calibrate_tokens": arguments.calibrate_tokens}, **{name: getattr(arguments, name) for name in words},
    )  # fmt: skip
    with Progress() as progress:
        done = retrofit(request, progress)
    print(done.result.report.text())
    if arguments.test:
        model, tokenizer = done.load()
        print(f"\n{compare(done.model(done.folder), model, tokenizer, prompt=arguments.test_prompt).text()}")
    print(f"\nwritten to {out}")
    return 0
