"""Which of the pieces that mla_pass can use are installed here, and what each is needed for."""

import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib import metadata, util
from typing import Any

import mla_pass
from mla_pass import native
from mla_pass.errors import MlaPassError

_CORE = ("numpy", "onnx", "onnx_ir", "ml_dtypes", "tqdm")
_OPTIONAL = {
    "onnxruntime": "running and calibrating models: pip install 'mla-pass[cpu]' (or [cuda])",
    "torch": "exporting checkpoints: pip install 'mla-pass[torch]'",
    "transformers": "exporting checkpoints: pip install 'mla-pass[torch]'",
    "onnxscript": "exporting checkpoints: pip install 'mla-pass[torch]'",
    "gguf": "reading GGUF files: pip install 'mla-pass[torch]'",
    "onnxruntime_genai": "onnxruntime-genai folders: pip install 'mla-pass[genai]'",
}


@dataclass(frozen=True)
class Environment:
    """Versions by import name (None: not installed) and what is usable."""

    mla_pass: str
    python: str
    platform: str
    packages: dict[str, str | None]
    providers: tuple[str, ...]
    """Execution providers of the ONNX Runtime found, in its own order of preference."""
    native_library: str | None
    """Path of the op library, None when it is not built."""
    instruction_sets: tuple[str, ...]
    """Those that the op library has kernels for and this processor runs, best first."""
    cuda_kernels: tuple[str, ...]
    """Compute capabilities that the op library has kernels for, none where it was built without CUDA's compiler."""
    cuda_driver: str
    """Version and devices of the CUDA driver, or why there is none."""

    def to_json(self) -> dict[str, Any]:
        """Plain data for a JSON file."""
        return asdict(self)

    def text(self) -> str:
        """One aligned line a fact."""
        rows = [("mla_pass", self.mla_pass), ("python", self.python), ("platform", self.platform)]
        for name, version in self.packages.items():
            purpose = f"not installed ({_OPTIONAL[name]})" if name in _OPTIONAL else "not installed"
            rows.append((name, version or purpose))
        rows.append(("providers", ", ".join(self.providers) or "none: no ONNX Runtime"))
        rows.append(("native library", self.native_library or "not built: the op runs as stock ONNX ops"))
        if self.native_library:
            rows.append(("instruction sets", ", ".join(self.instruction_sets)))
            absent = "not built: there was no nvcc, CUDA's compiler, when mla_pass was installed"
            rows.append(("CUDA kernels", ", ".join(self.cuda_kernels) or absent))
            rows.append(("CUDA driver", self.cuda_driver))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)


def environment() -> Environment:
    """Looks at this Python installation. Imports ONNX Runtime if it is there, and nothing else."""
    built = native.find_library() is not None
    distributions = metadata.packages_distributions()
    return Environment(
        mla_pass=mla_pass.__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        packages={name: _version(name, distributions.get(name, ())) for name in (*_CORE, *_OPTIONAL)},
        providers=_providers(),
        native_library=native.find_library(),
        instruction_sets=native.instruction_sets() if built else (),
        cuda_kernels=native.cuda_capabilities() if built else (),
        cuda_driver=_cuda_driver() if built else "not asked for: the op library is not built",
    )


def _cuda_driver() -> str:
    try:
        driver = native.cuda_driver()
    except MlaPassError as error:
        return str(error)
    return f"CUDA {driver.version}, {', '.join(driver.devices) or 'no device'}"


def _version(module: str, distributions: Iterable[str]) -> str | None:
    """Version of an importable module, of every distribution that brings it (onnxruntime may come from several)."""
    if util.find_spec(module) is None:
        return None
    versions = {name: metadata.version(name) for name in distributions}
    if len(versions) == 1:
        return next(iter(versions.values()))
    return ", ".join(f"{name} {version}" for name, version in sorted(versions.items())) or "unknown version"


def _providers() -> tuple[str, ...]:
    if util.find_spec("onnxruntime") is None:
        return ()
    import onnxruntime

    return tuple(onnxruntime.get_available_providers())
