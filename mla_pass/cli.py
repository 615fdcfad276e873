"""The `mla-pass` command: arguments in, one call of the library, its result on stdout.

Progress goes to stderr. Exit codes: 0 done, 1 a `MlaPassError` told in one sentence (or a result that says no),
2 wrong arguments, 130 interrupted.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import mla_pass
from mla_pass import native
from mla_pass.config import (
    Absorb,
    CacheDtype,
    CacheKind,
    Layers,
    Layout,
    MetricKind,
    MlaConfig,
    RopeDtype,
    RopeMode,
    Target,
)
from mla_pass.console import told
from mla_pass.errors import MlaPassError
from mla_pass.export.layout import FORMATS, is_checkpoint
from mla_pass.progress import Progress

if TYPE_CHECKING:
    from mla_pass.site import AttentionSite
    from mla_pass.statistics import Calibration


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns the exit code."""
    arguments = _parser().parse_args(argv)
    return told("mla-pass", lambda: arguments.run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mla-pass", description=(mla_pass.__doc__ or "").splitlines()[0])
    parser.add_argument("--version", action="version", version=f"mla-pass {mla_pass.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], about: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".")
        added.set_defaults(run=run)
        added.add_argument("--json", action="store_true", help="print the result as JSON")
        return added

    _add_export(command("export", _export, "write a Hugging Face checkpoint as ONNX with a flat cache"))
    _add_explain(command("explain", _explain, "list the attention blocks of a model, or why one cannot be read"))
    _add_convert(command("convert", _convert, "rewrite a model's attention as multi-head latent attention"))
    _add_heal(command("heal", _heal, "train a converted model's latent attention towards what the original predicts"))
    _add_verify(command("verify", _verify, "compare the next-token distributions of two models on the same text"))
    _add_generate(command("generate", _generate, "continue prompts with an original or a converted model"))
    _add_perplexity(command("perplexity", _perplexity, "measure a model's mean loss per token on a text"))
    command("env", _env, "list the versions and runtimes found here")
    return parser


# ---- export


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="folder of a Hugging Face checkpoint, or its id where a hub is reachable")
    parser.add_argument("out", type=Path, help="folder to write, new or empty")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--opset", type=int, default=18)


def _export(arguments: argparse.Namespace) -> int:
    from mla_pass.export.hf import export_hf

    out = export_hf(arguments.source, arguments.out, dtype=arguments.dtype, opset=arguments.opset)
    return _show(arguments, {"out": str(out)}, str(out))


# ---- explain


def _add_explain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="model.onnx or its folder")


def _explain(arguments: argparse.Namespace) -> int:
    from mla_pass.site import Refusal

    found = mla_pass.explain(arguments.model)
    refusals = [item for item in found if isinstance(item, Refusal)]
    sites = [item for item in found if not isinstance(item, Refusal)]
    data = {"sites": [_site_json(site) for site in sites], "refusals": [vars(refusal) for refusal in refusals]}
    lines = [site.summary() for site in sites] + [f"refused: {refusal}" for refusal in refusals]
    _show(arguments, data, "\n".join([*lines, f"{len(sites)} would convert, {len(refusals)} refused"]))
    return 1 if refusals or not sites else 0


def _site_json(site: "AttentionSite") -> dict[str, Any]:
    names = ("name", "layer", "heads", "kv_groups", "head_dim", "value_dim", "cache_width", "dtype")
    return {**{name: getattr(site, name) for name in names}, "summary": site.summary()}


# ---- convert


def _add_convert(parser: argparse.ArgumentParser) -> None:
    default = MlaConfig()
    parser.add_argument("model", type=Path, help="model.onnx, its folder, or a Hugging Face checkpoint's")
    parser.add_argument("out", type=Path, help="folder to write, new or empty")
    parser.add_argument(
        "--format", choices=(*FORMATS, "deepseek_v3"),
        help="of a checkpoint: what to write, a checkpoint (the default), ONNX, both, the ONNX folder within, or one "
        "that transformers loads as DeepSeek-V3 without mla_pass",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="of the weights of --format hf")
    parser.add_argument("--budget", type=float, help=f"size of the new cache, 0 to 1 of the old ({default.budget})")
    parser.add_argument(
        "--max-loss", type=float, metavar="NATS",
        help="instead of --budget: the smallest cache that loses at most so much per token on held-out text",
    )  # fmt: skip
    parser.add_argument("--rank", type=int, help="width of the latent, instead of --budget")
    parser.add_argument("--rope-dims", type=int, help="with --rank: numbers a token keeps with their own rotation")
    parser.add_argument(
        "--calibrate", default="self", metavar="self|FILE.txt|IDS.npy",
        help="text to fit the latents to; `self`, the default, lets the model write it",
    )  # fmt: skip
    parser.add_argument("--calibrate-tokens", type=int, default=default.calibrate_tokens, metavar="N")
    parser.add_argument(
        "--calibrate-self", type=float, default=default.calibrate_self, metavar="SHARE",
        help="share of the calibration text that the model writes itself beside the text given (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--stats", type=Path, metavar="FILE.safetensors",
        help="calibration statistics: read if the file is there, else written; another budget then costs seconds",
    )  # fmt: skip
    parser.add_argument(
        "--cache-dtype", choices=get_args(CacheDtype), default=default.cache_dtype,
        help="type of the cached latents: as the model, 16 or 8 bits, or what loses least at equal bytes (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--rope-dtype", choices=get_args(RopeDtype), default=default.rope_dtype,
                        help="type of a row's rotated part; auto: as the latents, but 16 bits beside int8")  # fmt: skip
    parser.add_argument(
        "--target", choices=get_args(Target), default=default.target,
        help="what a block becomes: our operator (the default), or ONNX Runtime's own PagedAttention, for CUDA servers",
    )  # fmt: skip
    parser.add_argument(
        "--layout", choices=get_args(Layout), default=default.layout,
        help="how a row lies in its two cache tensors; genai: two halves, and all that onnxruntime-genai reads",
    )  # fmt: skip
    parser.add_argument("--metric", choices=get_args(MetricKind), default=default.metric, help="what loss is judged by")
    parser.add_argument("--layers", choices=get_args(Layers), default=default.layers, help="sizes by loss, or all even")
    parser.add_argument(
        "--attention-flops", type=float, default=default.attention_flops, metavar="X",
        help=f"most arithmetic of attention, times plain absorbed attention ({default.attention_flops})",
    )  # fmt: skip
    parser.add_argument(
        "--finest-block", type=int, metavar="ROWS",
        help="rows that the keys' rotation stands still at the least, a power of two; by default each layer's choice. "
        "For GPUs: 256",
    )  # fmt: skip
    parser.add_argument(
        "--rope-mode", choices=get_args(RopeMode),
        help="rotation of the keys in the latent: block by block (the default), left off (extend, the default of "
        "--target ort-latent), or kept whole (repeat)",
    )  # fmt: skip
    parser.add_argument("--absorb", choices=get_args(Absorb), default=default.absorb)
    parser.add_argument("--cache", choices=get_args(CacheKind), default=default.cache, help="a buffer, or appended to")
    parser.add_argument("--max-positions", type=int, metavar="N", help="rows of the rotary table (the model's limit)")
    parser.add_argument("--partial", action="store_true", help="convert what can be read even if a block is refused")
    parser.add_argument("--bundle", action="store_true", help="put the op library beside the model")
    parser.add_argument("--dry-run", action="store_true", help="do all the work, print the report, write nothing")
    parser.set_defaults(usage_error=parser.error)


def _convert(arguments: argparse.Namespace) -> int:
    from mla_pass.export.layout import require_free
    from mla_pass.statistics import Calibration

    config = _config(arguments)
    if not arguments.dry_run:
        require_free(arguments.out)  # saving asks again; here it costs no minutes first
        if arguments.bundle:
            native.library_path()  # likewise
    calibrate = arguments.calibrate if arguments.calibrate == "self" else Path(arguments.calibrate)
    known = Calibration.load(arguments.stats) if arguments.stats and arguments.stats.exists() else None
    if arguments.format == "deepseek_v3" and _is_checkpoint(arguments):
        return _convert_to_deepseek(arguments, config, calibrate, known)
    with Progress() as progress:
        given: dict[str, Any] = {"calibrate": calibrate, "calibration": known, "progress": progress}
        result: Any
        if _is_checkpoint(arguments):
            from mla_pass.pytorch.convert import convert_checkpoint

            result = convert_checkpoint(arguments.model, config, dtype=arguments.dtype, **given)
        else:
            result = mla_pass.convert(arguments.model, config, **given)
    if arguments.stats and known is None:
        result.calibration.save(arguments.stats)
    if not arguments.dry_run:
        told = {"format": arguments.format or "hf"} if _is_checkpoint(arguments) else {}
        result.save(arguments.out, bundle=arguments.bundle, **told)
    data = {"out": None if arguments.dry_run else str(arguments.out), "report": result.report.to_json()}
    return _show(arguments, data, result.report.text(would=arguments.dry_run))


def _convert_to_deepseek(
    arguments: argparse.Namespace, config: MlaConfig, calibrate: "str | Path", known: "Calibration | None"
) -> int:
    from mla_pass.pytorch.convert import convert_to_deepseek

    for wrong in ("bundle", "dry_run", "dtype"):
        if getattr(arguments, wrong):
            arguments.usage_error(f"--format deepseek_v3 goes without --{wrong.replace('_', '-')}")
    with Progress() as progress:
        report, found = convert_to_deepseek(
            arguments.model, arguments.out, config, calibrate=calibrate, calibration=known, progress=progress
        )
    if arguments.stats and known is None:
        found.save(arguments.stats)
    return _show(arguments, {**vars(report), "path": str(report.path)}, report.text())


def _is_checkpoint(arguments: argparse.Namespace) -> bool:
    """Whether the model is a Hugging Face checkpoint and no ONNX model."""
    folder: Path = arguments.model
    found = is_checkpoint(folder)
    if not found and (arguments.format not in (None, "onnx") or arguments.dtype is not None):
        raise MlaPassError(
            f"{folder} is no Hugging Face checkpoint; --format {arguments.format or 'hf'} and --dtype are for one: "
            "give the folder that the ONNX model was exported from"
        )
    return found


def _config(arguments: argparse.Namespace) -> MlaConfig:
    if arguments.rank is not None and arguments.budget is not None:
        arguments.usage_error("--rank and --budget exclude each other")
    if arguments.rope_dims is not None and arguments.rank is None:
        arguments.usage_error("--rope-dims needs --rank")
    if arguments.max_loss is not None and (arguments.budget is not None or arguments.rank is not None):
        arguments.usage_error("--max-loss excludes --budget and --rank")
    budget = {} if arguments.budget is None else {"budget": arguments.budget}
    if arguments.target == "ort-latent" and arguments.bundle:
        arguments.usage_error("--target ort-latent needs no op library: it goes without --bundle")
    usual_mode = "extend" if arguments.target == "ort-latent" else MlaConfig().rope_mode
    return MlaConfig(
        **budget,
        rank=arguments.rank,
        rope_dims=arguments.rope_dims,
        rope_mode=arguments.rope_mode or usual_mode,
        absorb=arguments.absorb,
        cache=arguments.cache,
        target=arguments.target,
        layout=arguments.layout,
        cache_dtype=arguments.cache_dtype,
        rope_dtype=arguments.rope_dtype,
        max_loss=arguments.max_loss,
        metric=arguments.metric,
        layers=arguments.layers,
        attention_flops=arguments.attention_flops,
        finest_block=arguments.finest_block,
        calibrate_tokens=arguments.calibrate_tokens,
        calibrate_self=arguments.calibrate_self,
        max_positions=arguments.max_positions,
        partial=arguments.partial,
    )


# ---- heal


def _add_heal(parser: argparse.ArgumentParser) -> None:
    from mla_pass.healing.config import HealConfig

    default = HealConfig()
    parser.add_argument("original", type=Path, help="folder of the original: ONNX or a checkpoint; or a program's .pt2")
    parser.add_argument("converted", type=Path, help="what convert made of it, of the same kind")
    parser.add_argument("out", type=Path, help="folder to write, new or empty")
    parser.add_argument(
        "--text", default="self", metavar="self|FILE.txt|IDS.npy",
        help="text to train on; `self`, the default, lets the original model write it. A program takes ids alone",
    )  # fmt: skip
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--minutes", type=float, default=default.minutes, metavar="M", help=f"({default.minutes:g})")
    budget.add_argument("--tokens", type=int, metavar="N", help="train on so many, however long it takes")
    parser.add_argument("--context", type=int, default=default.context, metavar="N", help="tokens of a sequence (512)")
    parser.add_argument("--batch", type=int, default=default.batch, metavar="B", help="sequences of a step")
    parser.add_argument("--lr", type=float, default=default.lr, metavar="X", help="first steps relative to the weights")
    parser.add_argument("--seed", type=int, default=default.seed, metavar="S")
    parser.add_argument("--resume", action="store_true", help="go on with a run that was interrupted")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")


def _heal(arguments: argparse.Namespace) -> int:
    from mla_pass.healing.config import HealConfig

    names = ("minutes", "tokens", "context", "batch", "lr", "seed")
    config = HealConfig(**{name: getattr(arguments, name) for name in names})
    text = arguments.text if arguments.text == "self" else Path(arguments.text)
    folders = (arguments.original, arguments.converted, arguments.out)
    try:
        with Progress() as progress:
            healing = mla_pass.heal(
                *folders, text=text, config=config, resume=arguments.resume, device=arguments.device, progress=progress
            )
    except KeyboardInterrupt as stop:
        if str(stop):  # where the state lies and how to go on
            print(f"mla-pass: {stop}", file=sys.stderr)
        raise
    return _show(arguments, {"out": str(arguments.out), **healing.to_json()}, healing.text())


# ---- verify


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("original", type=Path, help="folder of the original model")
    parser.add_argument("converted", type=Path, help="folder of the converted model")
    parser.add_argument("--text", type=Path, help="text to compare on; without it the original model writes one")
    parser.add_argument("--tokens", type=int, default=512, help="how many tokens of it (512)")
    parser.add_argument("--max-kl", type=float, help="exit with 1 if the divergence, nats per token, is larger")


def _verify(arguments: argparse.Namespace) -> int:
    import numpy as np

    from mla_pass.onnx.perplexity import sample_tokens
    from mla_pass.onnx.session import session
    from mla_pass.onnx.verify import verify

    original, converted = session(arguments.original), session(arguments.converted)
    if arguments.text is None:
        tokens = sample_tokens(original, arguments.tokens).reshape(-1)[: arguments.tokens]
    else:
        tokens = np.array(_token_ids(original.folder, arguments.text))[: arguments.tokens]
    agreement = verify(original, converted, tokens)
    _show(arguments, vars(agreement), agreement.text())
    return 1 if arguments.max_kl is not None and not agreement.kl <= arguments.max_kl else 0


# ---- generate


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="folder of an original or a converted model")
    parser.add_argument("--prompt", action="append", required=True, help="repeat it to run several as one batch")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0, help="0, the default, considers all tokens")
    parser.add_argument("--seed", type=int, default=0)


def _generate(arguments: argparse.Namespace) -> int:
    from mla_pass.onnx.generate import GenerateConfig, generate
    from mla_pass.onnx.session import session

    names = ("max_new_tokens", "temperature", "top_p", "top_k", "seed")
    config = GenerateConfig(**{name: getattr(arguments, name) for name in names})
    unsaid = list(arguments.prompt[:1])  # goes out with the first piece: an error before it leaves stdout empty

    def say(row: int, piece: str) -> None:
        print(*unsaid, piece, sep="", end="", flush=True)
        unsaid.clear()

    model = session(arguments.model)
    if arguments.json or len(arguments.prompt) > 1:
        done = generate(model, arguments.prompt, config)
        _show(arguments, vars(done), "\n\n".join(map(str.__add__, arguments.prompt, done.texts)))
    else:
        done = generate(model, arguments.prompt, config, on_token=say)
        print(*unsaid)
    print(
        f"{done.new_tokens} tokens, {done.tokens_per_second:.1f} tokens/s after a prefill of "
        f"{done.prefill_seconds:.2f} s, cache {done.cache_bytes_per_token:,.0f} bytes per token",
        file=sys.stderr,
    )
    return 0


# ---- perplexity


def _add_perplexity(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="folder of an original or a converted model")
    parser.add_argument("--text", type=Path, required=True, help="text file, UTF-8")
    parser.add_argument("--windows", type=int, default=16, help="windows from the start of the text (16)")
    parser.add_argument("--context", type=int, default=1024, help="tokens of a window, each run by itself (1024)")


def _perplexity(arguments: argparse.Namespace) -> int:
    from mla_pass.onnx.perplexity import perplexity
    from mla_pass.onnx.session import session
    from mla_pass.onnx.text import load_tokenizer

    model = session(arguments.model)
    tokens = _token_ids(model.folder, arguments.text)
    bos = load_tokenizer(model.folder).leading_bos
    measured = perplexity(model, tokens, windows=arguments.windows, context=arguments.context, bos=bos)
    spread = "" if measured.stderr is None else f" +- {measured.stderr:.4f}"
    loss = f"{measured.nll:.4f}{spread} nats per token over {measured.tokens} tokens"
    text = f"{loss}, perplexity {measured.perplexity:.3f}"
    return _show(arguments, {**vars(measured), "perplexity": measured.perplexity}, text)


def _token_ids(folder: Path, text: Path) -> list[int]:
    """A text file through the tokenizer of a model's folder, without special tokens."""
    from mla_pass.onnx.text import load_tokenizer

    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MlaPassError(f"cannot read {text} as UTF-8 text: {error}") from error
    return load_tokenizer(folder).encode(content)


# ---- env


def _env(arguments: argparse.Namespace) -> int:
    from mla_pass.env import environment

    found = environment()
    return _show(arguments, found.to_json(), found.text())


# ---- common to all


def _show(arguments: argparse.Namespace, data: Any, text: str) -> int:
    print(json.dumps(data, indent=2) if arguments.json else text)
    return 0
