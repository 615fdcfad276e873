"""The programs that test CUDA kernels alone: under sanitizers, and on sources that are broken on purpose."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cuda_build import COMPILER, FLAGS, NATIVE, PLAN_SOURCES, ROOT, SHIM, SHIM_SOURCES, needs_compiler

pytestmark = [needs_compiler, pytest.mark.slow]


@dataclass(frozen=True)
class Mutant:
    """`old`, which is in the file once, becomes `new`."""

    name: str
    file: str
    old: str
    new: str
    program: str = "test_attend"


MUTANTS = (
    Mutant("dropped barrier", "attend_state.cuh", "T::pack(low, high);\n      }\n    }\n    barrier();",
           "T::pack(low, high);\n      }\n    }"),
    Mutant("wrong wait depth", "attend.cuh", "copy_wait<0>();", "copy_wait<1>();"),
    Mutant("a key too few", "attend_copy.cuh", "min(work_.seen.end - first, p_.tile)",
           "min(work_.seen.end - first - 1, p_.tile)"),
    Mutant("swapped fragment of keys", "attend_scores.cuh", "load_matrices(b, key);",
           "load_matrices_transposed(b, key);"),
    Mutant("swapped fragment of values", "attend_state.cuh", "mma<T>(sum_[j][1], weight, value[2], value[3]);",
           "mma<T>(sum_[j][1], weight, value[3], value[2]);"),
    Mutant("query of the wrong buffer", "attend.cuh", "? block & 1 : 0", "? block & 0 : 0"),
    Mutant("dropped barrier of a product", "product.cuh", "      copy_wait<0>();\n      barrier();  // this",
           "      copy_wait<0>();\n      // this", "test_products"),
    Mutant("wrong wait depth of a product", "product.cuh", "      copy_wait<0>();\n      barrier();  // this",
           "      copy_wait<1>();\n      barrier();  // this", "test_products"),
    Mutant("swapped fragment of a product", "product.cuh",
           "b[part / 2][part % 2 * 2], b[part / 2][part % 2 * 2 + 1]",
           "b[part / 2][part % 2 * 2 + 1], b[part / 2][part % 2 * 2]", "test_products"),
    Mutant("a tail of a product", "product.cuh", "max(0, min(8, end - begin)) : 0",
           "max(0, min(8, end - begin + 1)) : 0", "test_products"),
)  # fmt: skip


def compiled(name: str, root: Path, folder: Path, *flags: str) -> Path:
    """A program of the sources below `root`."""
    assert COMPILER is not None
    sources = [root / path.relative_to(ROOT) for path in (*SHIM_SOURCES, SHIM / f"{name}.cc", *PLAN_SOURCES)]
    own = [flag.replace(str(ROOT), str(root)) for flag in FLAGS]
    subprocess.run([COMPILER, *own, *flags, *map(str, sources), "-o", str(folder / name)], check=True)
    return folder / name


def run(program: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run([program], capture_output=True, text=True, errors="replace", timeout=1800, env=environment)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_is_found(mutant: Mutant, tmp_path: Path) -> None:
    shutil.copytree(NATIVE, tmp_path / NATIVE.relative_to(ROOT))
    shutil.copytree(SHIM, tmp_path / SHIM.relative_to(ROOT))
    source = tmp_path / NATIVE.relative_to(ROOT) / "cuda" / mutant.file
    text = source.read_text()
    assert text.count(mutant.old) == 1
    source.write_text(text.replace(mutant.old, mutant.new))
    assert run(compiled(mutant.program, tmp_path, tmp_path)).returncode != 0


# ThreadSanitizer does not see a memcpy of a constant size, which g++ expands.
SANITIZERS = {
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "races": ("-fsanitize=thread", "-fno-builtin-memcpy", "-fno-builtin-memset"),
}


@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("name", ["test_attend", "test_products"])
def test_kernels_under_sanitizers(name: str, sanitizer: str, tmp_path: Path) -> None:
    done = run(compiled(name, ROOT, tmp_path, "-O1", "-g", *SANITIZERS[sanitizer]))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
