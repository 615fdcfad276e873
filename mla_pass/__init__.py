"""mla_pass: a compiler pass from grouped-query attention to multi-head latent attention.

    import mla_pass
    result = mla_pass.convert("model/", mla_pass.MlaConfig(budget=0.5))
    print(result.report.text())
    result.save("out/")

The public names below load on first use, so that `import mla_pass` (and `mla-pass --help`) costs nothing.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mla_pass.errors import MlaPassError

if TYPE_CHECKING:
    from mla_pass import export as export
    from mla_pass.config import MlaConfig as MlaConfig
    from mla_pass.convert import Result as Result
    from mla_pass.convert import convert as convert
    from mla_pass.convert import explain as explain
    from mla_pass.healing.config import HealConfig as HealConfig
    from mla_pass.healing.config import Healing as Healing
    from mla_pass.healing.run import heal as heal
    from mla_pass.onnx.passes import MlaPass as MlaPass
    from mla_pass.onnx.session import session as session
    from mla_pass.pytorch.cache import LatentCache as LatentCache
    from mla_pass.pytorch.convert import convert_checkpoint as convert_checkpoint

__version__ = "0.1.0"

__all__ = [
    "HealConfig", "Healing", "LatentCache", "MlaConfig", "MlaPass", "MlaPassError", "Result", "__version__", "convert",
    "convert_checkpoint", "explain", "export", "heal", "session",
]  # fmt: skip

# patterns/ and export/ install inside this package but lie beside it in the repository. Imported from a checkout,
# the repository's root is one more place to look for sub-packages.
_here = Path(__file__).resolve().parent
if not (_here / "patterns").is_dir() and (_here.parent / "patterns").is_dir():
    __path__.append(str(_here.parent))

_HOME = {
    "HealConfig": "mla_pass.healing.config",
    "Healing": "mla_pass.healing.config",
    "LatentCache": "mla_pass.pytorch.cache",
    "MlaConfig": "mla_pass.config",
    "MlaPass": "mla_pass.onnx.passes",
    "Result": "mla_pass.convert",
    "convert": "mla_pass.convert",
    "convert_checkpoint": "mla_pass.pytorch.convert",
    "explain": "mla_pass.convert",
    "heal": "mla_pass.healing.run",
    "session": "mla_pass.onnx.session",
}


def __getattr__(name: str) -> Any:
    if name == "export":
        return importlib.import_module("mla_pass.export")
    if name not in _HOME:
        raise AttributeError(f"module 'mla_pass' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """`mla_pass.convert` is the function, also after `import mla_pass.convert`.

    Importing a submodule binds it as an attribute of its package; that would hide the public function of that name.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
