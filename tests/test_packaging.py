"""What a build contains, and that the two top-level folders import as sub-packages and as nothing else."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WHERE = """
from importlib.util import find_spec
for name in ("mla_pass.patterns", "mla_pass.export"):
    print(find_spec(name).origin)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a copy of the tracked and new files, so that a build folder of the checkout plays no part."""
    if importlib.util.find_spec("scikit_build_core") is None:
        pytest.fail("the packaging tests need scikit-build-core: pip install -e '.[test]'")
    out = tmp_path_factory.mktemp("wheel")
    build = out / "build"
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    command += ["-C", "cmake.define.MLA_PASS_CUDA=OFF"]  # tests/test_cuda_gates.py compiles the kernels
    subprocess.run([*command, "-C", f"build-dir={build}", "-w", str(out), str(ROOT)], check=True)
    (built,) = out.glob("*.whl")
    return built


def python(code: str, *, cwd: Path, path: Path | str = "", site: bool = False) -> subprocess.CompletedProcess[str]:
    """Runs `code` in `cwd`; without `site` nothing that is installed in this environment plays a part."""
    command = [sys.executable, *([] if site else ["-S"]), "-c", code]
    return subprocess.run(command, cwd=cwd, env={**os.environ, "PYTHONPATH": str(path)}, capture_output=True, text=True)


def test_the_wheel_holds_our_packages_alone(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"mla_pass", "mla_retrofit"}
    for expected in ("patterns/__init__.py", "export/__init__.py", "py.typed", "cli.py", "onnx/session.py"):
        assert f"mla_pass/{expected}" in names


def test_the_wheel_holds_every_source_file(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, inside in (("mla_pass", "mla_pass"), ("patterns", "mla_pass/patterns"), ("export", "mla_pass/export")):
        for source in (ROOT / folder).rglob("*.py"):
            assert f"{inside}/{source.relative_to(ROOT / folder).as_posix()}" in names


def test_the_wheel_holds_the_op_library_and_not_its_sources(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "mla_pass/lib/libmla_pass.so" in names and "mla_pass/native/__init__.py" in names
    sources = (".cc", ".h", ".cu", ".cuh", ".def", ".cmake", "CMakeLists.txt")
    assert [name for name in names if name.endswith(sources) or "native/cuda" in name] == []
    assert wheel.name.split("-")[2:4] == ["py3", "none"] and not wheel.name.endswith("-any.whl")


def test_without_a_compiler_an_install_says_so_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "bin"
    path.mkdir()
    tools = {tool: shutil.which(tool) for tool in ("cmake", "make", "ninja")}
    assert tools["cmake"], "the test needs cmake"
    for tool, found in tools.items():
        if found:
            (path / tool).symlink_to(found)
    environment = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX")}
    generator = "Ninja" if tools["ninja"] else "Unix Makefiles"
    command = [path / "cmake", "-S", ROOT, "-B", tmp_path / "build", "-G", generator]
    auto = subprocess.run(command, env=environment | {"PATH": str(path)}, capture_output=True, text=True)
    told = " ".join(auto.stderr.split())
    assert auto.returncode == 0, auto.stderr
    assert "mla_pass is installed without its op library: there is no C++ compiler." in told
    forced = subprocess.run(
        [*command, "-DMLA_PASS_NATIVE=ON"], env=environment | {"PATH": str(path)}, capture_output=True, text=True
    )
    assert forced.returncode != 0


class TestCudaKernels:
    """What a build says of them; nothing is compiled but a kernel that does nothing."""

    NVCC = """#!/bin/sh
case "$*" in
  *--version*) echo "Cuda compilation tools, release 12.4, V12.4.131" ;;
  *--list-gpu-code*) printf 'sm_80\nsm_86\nsm_90\n' ;;
  *--dryrun*) echo "#$ _HERE_={tools}" >&2 ;;
  *nothing.cu*) exit 1 ;;
  *) echo "{said}"; exit {status} ;;
esac
"""

    def configure(self, folder: Path, *options: str, nvcc: str = "", **variables: str) -> tuple[int, str]:
        """Status and sayings of cmake where `nvcc` is the CUDA compiler, or where `variables` tell of one."""
        tools = folder / "tools"
        tools.mkdir()
        (tools / "fatbinary").write_text("#!/bin/sh\n")
        (tools / "fatbinary").chmod(0o755)
        if nvcc:
            (folder / "nvcc").write_text(nvcc.replace("{tools}", str(tools)))
            (folder / "nvcc").chmod(0o755)
            variables["CUDACXX"] = str(folder / "nvcc")
        else:
            options += () if variables else ("-DMLA_PASS_NVCC=",)  # as if the search had come to nothing
        kept = {k: v for k, v in os.environ.items() if k not in ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "VIRTUAL_ENV")}
        command = ["cmake", "-S", ROOT, "-B", folder / "build", "-DMLA_PASS_NATIVE=ON", *options]
        ran = subprocess.run(command, env=kept | variables, capture_output=True, text=True)
        return ran.returncode, " ".join((ran.stdout + ran.stderr).split())

    def working(self) -> str:
        return self.NVCC.replace("{said}", "").replace("{status}", "0")

    def test_without_nvcc_it_is_a_cpu_build_and_says_so(self, tmp_path: Path) -> None:
        status, told = self.configure(tmp_path)
        assert status == 0
        assert "mla_pass is built without CUDA kernels, for the CPU alone: there is no nvcc. Install CUDA" in told

    def test_one_that_does_not_work_is_none(self, tmp_path: Path) -> None:
        nvcc = self.NVCC.replace("{said}", "no headers").replace("{status}", "1")
        status, told = self.configure(tmp_path, nvcc=nvcc)
        assert status == 0 and f"for the CPU alone: {tmp_path}/nvcc does not compile: no headers." in told

    def test_where_they_are_asked_for_there_has_to_be_one(self, tmp_path: Path) -> None:
        status, told = self.configure(tmp_path, "-DMLA_PASS_CUDA=ON")
        assert status != 0 and "MLA_PASS_CUDA is ON; expected an nvcc that works, but there is no nvcc" in told

    def test_off(self, tmp_path: Path) -> None:
        status, told = self.configure(tmp_path, "-DMLA_PASS_CUDA=OFF", nvcc=self.working())
        assert status == 0 and "CUDA" not in told

    def test_all_architectures_that_it_knows(self, tmp_path: Path) -> None:
        status, told = self.configure(tmp_path, nvcc=self.working())
        assert status == 0 and "mla_pass: CUDA kernels for 8.0, 8.6, 9.0 by CUDA 12.4" in told

    def test_those_that_are_asked_for(self, tmp_path: Path) -> None:
        status, told = self.configure(tmp_path, "-DMLA_PASS_CUDA_ARCHITECTURES=90;80", nvcc=self.working())
        assert status == 0 and "mla_pass: CUDA kernels for 8.0, 9.0 by CUDA 12.4" in told

    @pytest.mark.parametrize("asked", ["120", "70", "9.0", "90a"])
    def test_one_that_it_does_not_know(self, tmp_path: Path, asked: str) -> None:
        status, told = self.configure(tmp_path, f"-DMLA_PASS_CUDA_ARCHITECTURES={asked}", nvcc=self.working())
        assert status != 0
        assert f"MLA_PASS_CUDA_ARCHITECTURES holds {asked}; expected numbers from 80 on that {tmp_path}/nvcc" in told

    def test_one_of_the_python_environment(self, tmp_path: Path) -> None:
        folder = tmp_path / "lib" / "python3.11" / "site-packages" / "nvidia" / "cu13" / "bin"
        folder.mkdir(parents=True)
        (folder / "nvcc").write_text(self.working().replace("{tools}", str(tmp_path / "tools")))
        (folder / "nvcc").chmod(0o755)
        status, told = self.configure(tmp_path, VIRTUAL_ENV=str(tmp_path))
        assert status == 0 and "mla_pass: CUDA kernels for 8.0, 8.6, 9.0 by CUDA 12.4" in told


def test_the_wheel_works_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    ran = python(WHERE, cwd=tmp_path, path=site)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == [str(site / "mla_pass" / folder / "__init__.py") for folder in ("patterns", "export")]


def test_the_wheel_works_from_the_checkout_root(wheel: Path, tmp_path: Path) -> None:
    """Python looks in the current folder first and finds mla_pass there without its two sub-packages."""
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    ran = python(WHERE, cwd=ROOT, path=site)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == [str(ROOT / folder / "__init__.py") for folder in ("patterns", "export")]


@pytest.mark.parametrize("name", ["patterns", "export"])
def test_the_folders_refuse_to_be_top_level_packages(name: str) -> None:
    ran = python(f"import {name}", cwd=ROOT)
    assert ran.returncode != 0
    assert f"ImportError: this package imports as mla_pass.{name}, not as {name}" in ran.stderr


def test_an_editable_install_finds_new_files(tmp_path: Path) -> None:
    """Nothing lists the modules of a package: a file written after the install is there, from any folder."""
    checkout, environment = tmp_path / "checkout", tmp_path / "environment"
    checkout.mkdir()
    for name in ("mla_pass", "patterns", "export"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__", "lib"))
    for name in ("pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    own = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
    (own / "borrow.pth").write_text(sysconfig.get_path("purelib"))  # numpy and the build backend; its .pth files rest
    install = [environment / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    install += ["-C", "cmake.define.MLA_PASS_NATIVE=OFF"]  # another test builds the library
    subprocess.run([*install, "--no-build-isolation", "-e", checkout], check=True)
    for folder in ("patterns", "export", "mla_pass/onnx", "mla_pass"):
        (checkout / folder / "brand_new.py").write_text("")
    modules = ("patterns.brand_new", "export.brand_new", "onnx.brand_new", "brand_new")
    code = "\n".join(f"import mla_pass.{module}" for module in modules)
    subprocess.run([environment / "bin" / "python", "-c", code], cwd=tmp_path, check=True)


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = "{'numpy', 'onnx', 'onnx_ir', 'onnxruntime', 'torch', 'transformers'}"
    ran = python(f"import sys, mla_pass, mla_pass.cli; print(sorted({heavy} & set(sys.modules)))", cwd=ROOT, site=True)
    assert (ran.returncode, ran.stdout.strip()) == (0, "[]"), ran.stderr


def test_public_names_resolve_and_are_not_hidden_by_their_modules() -> None:
    code = (
        "import mla_pass, mla_pass.convert as by_path\n"
        "from mla_pass.convert import convert\n"
        "assert mla_pass.convert is convert and callable(convert), mla_pass.convert\n"
        "assert [name for name in mla_pass.__all__ if getattr(mla_pass, name, None) is None] == []\n"
    )
    ran = python(code, cwd=ROOT, site=True)
    assert ran.returncode == 0, ran.stderr


def test_an_unknown_name_is_an_attribute_error() -> None:
    import mla_pass

    with pytest.raises(AttributeError, match="no_such_name"):
        _ = mla_pass.no_such_name
