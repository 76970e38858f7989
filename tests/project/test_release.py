"""What a release is made of: its files, what a wheel holds, what is refused."""

import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

import convmae_kernels
from convmae_kernels.ops.support.dispatch import LIBRARY_FILE
from convmae_kernels.torch_version import OLDEST_TORCH, why_too_old
from release import build, sbom
from release.build import ReleaseError
from tests.support.compat import oldest_torch
from tests.support.paths import ROOT

VERSION = convmae_kernels.__version__
needs_git = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout of git")
needs_library = pytest.mark.skipif(not LIBRARY_FILE.exists(), reason="nothing is compiled")


# -- the version --------------------------------------------------------------------------------


def test_the_documents_of_a_release_name_its_version():
    assert build.version() == VERSION
    assert f"\nversion: {VERSION}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {VERSION} " in (ROOT / "CHANGELOG.md").read_text()


def test_the_oldest_torch_is_the_same_everywhere():
    major, minor = OLDEST_TORCH
    assert oldest_torch() == f"{major}.{minor}"
    assert f'"0x{major:02x}{minor:02x}000000000000"' in (ROOT / "setup.py").read_text()


@pytest.mark.parametrize(
    "version", ["2.11.0", "2.11.0a0+git1234", "2.14.1+cpu", "3.0.0", "unknown"]
)
def test_torch_that_does(version):
    assert why_too_old(version) is None


def test_an_older_torch_is_refused():
    """Before anything of it is used: this one has nothing."""
    code = (
        "import sys, types\n"
        "torch = sys.modules['torch'] = types.ModuleType('torch')\n"
        "torch.__version__, torch.__file__ = '2.10.0+cu128', '/here/torch/__init__.py'\n"
        "import convmae_kernels\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == (
        "ImportError: convmae_kernels needs torch 2.11 or newer, found torch 2.10.0+cu128 in "
        "/here/torch/__init__.py: `pip install 'torch>=2.11'`"
    )


# -- the files ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The source distribution, and the folder it is unpacked to."""
    folder = tmp_path_factory.mktemp("release")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "WORK", folder)
        file = build.make_source_distribution(folder)
        return file, build.unpack(file)


@needs_git
def test_the_source_distribution(source):
    """Made of what is tracked; `make_source_distribution` has compared it with that."""
    file, folder = source
    assert file.name == f"convmae-{VERSION}.tar.gz"
    for name in ("csrc/cuda/rows.cuh", "tests/conftest.py", "constraints.txt", "SECURITY.md"):
        assert (folder / name).read_bytes() == (ROOT / name).read_bytes()
    assert not list(folder.rglob("*.so")) and not (folder / ".ci").exists()
    names = build.tracked_files()
    with pytest.raises(ReleaseError, match="lacks nothing, and has .'setup.py'. besides"):
        build.check_source_distribution(file, [name for name in names if name != "setup.py"])
    with pytest.raises(ReleaseError, match="lacks .'csrc/new.cu'., and has nothing besides"):
        build.check_source_distribution(file, [*names, "csrc/new.cu"])


@needs_git
@needs_library
def test_the_wheel(source, tmp_path, monkeypatch):
    """Built from the source distribution; what compiles is a stand-in that gives this library."""
    _, folder = source
    for name in (build.LICENCE_OF_CUDA, build.LICENCE_OF_TORCH):
        (folder / name).write_text("a licence")
    ninja = tmp_path / "bin" / "ninja"
    ninja.parent.mkdir()
    ninja.write_text(f'#!/bin/sh\ncp "{LIBRARY_FILE}" "$2/_C.so"\n')  # ninja -C <folder>
    ninja.chmod(0o755)
    monkeypatch.setattr(build, "WORK", tmp_path)
    monkeypatch.setenv("PATH", str(ninja.parent), prepend=":")
    linux = build.build_wheel(folder, "9.0")
    with pytest.raises(ReleaseError, match="-linux_.* has another tag, expected py3-none-many"):
        build.check_wheel(linux, folder)
    wheel = linux.with_name(f"convmae-{VERSION}-py3-none-manylinux_2_34_x86_64.whl")
    linux.rename(wheel)
    build.check_wheel(wheel, folder)
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read("convmae_kernels/_C.so") == LIBRARY_FILE.read_bytes()
        text = archive.read(f"convmae-{VERSION}.dist-info/METADATA").decode()
        assert f"Requires-Dist: torch>={oldest_torch()}\n" in text
        assert f"License-File: {build.LICENCE_OF_CUDA}\n" in text
    stray = wheel.with_name(wheel.name.replace("2_34", "2_35"))
    shutil.copy(wheel, stray)
    with zipfile.ZipFile(stray, "a") as archive:
        archive.writestr("tests/conftest.py", "x")
    with pytest.raises(ReleaseError, match="lacks nothing, has .'tests/conftest.py'. besides"):
        build.check_wheel(stray, folder)
    (folder / "convmae" / "new.py").write_text("x = 1\n")
    with pytest.raises(ReleaseError, match=r"lacks \['convmae/new.py'\]"):
        build.check_wheel(wheel, folder)


def test_unpacking_keeps_what_was_compiled(tmp_path, monkeypatch):
    """And nothing else: a module that is no longer there must not come into the wheel."""
    monkeypatch.setattr(build, "WORK", tmp_path)
    (tmp_path / "new.py").write_text("")
    file = tmp_path / "convmae-1.0.tar.gz"
    with tarfile.open(file, "w:gz") as archive:
        archive.add(tmp_path / "new.py", "convmae-1.0/convmae/new.py")
    folder = tmp_path / "convmae-1.0"
    for name in ("build/ninja/a.o", "build/lib/convmae/old.py", "convmae/old.py", "LICENSE-old"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    assert build.unpack(file) == folder
    left = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}
    assert left == {"convmae/new.py", "build/ninja/a.o"}


def test_a_release_without_nvcc_is_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert build.main([]) == 1
    assert capsys.readouterr().err.startswith("release: nvcc is not on the PATH nor in CUDA_HOME")


def test_licences_of_packages():
    assert "Copyright" in build.licence_of("torch")
    with pytest.raises(ReleaseError, match="no-such-package is not installed, or has no licence"):
        build.licence_of("no-such-package")


# -- what it depends on -------------------------------------------------------------------------


def test_packages_that_are_needed():
    names = sbom.needed(["torchmetrics[no_such_extra]", "nowhere; sys_platform == 'win32'"], ())
    assert {"torchmetrics", "torch", "numpy", "sympy"} <= names
    assert names.isdisjoint({"pytest", "convmae", "nowhere"})
    with pytest.raises(sbom.SbomError, match="nowhere>=2 is not installed"):
        sbom.needed(["nowhere>=2"], ())


def test_what_is_kept_of_an_environment():
    licence = {"license": {"name": "License :: OSI Approved :: BSD License"}}
    components = [
        {"bom-ref": "A==1", "name": "A", "version": "1", "licenses": [licence, licence]},
        {"bom-ref": "B==2", "name": "B", "version": "2", "licenses": [{"expression": "MIT"}]},
        {"bom-ref": "c==3", "name": "c", "version": "3"},
    ]
    graph = [
        {"ref": sbom.ROOT_COMPONENT, "dependsOn": ["A==1", "B==2"]},
        {"ref": "A==1", "dependsOn": ["B==2", "c==3"]},
        {"ref": "B==2"},
    ]
    bom = json.loads(json.dumps({"components": components, "dependencies": graph}))
    inside = {"bom-ref": "inside", "name": "Inside", "version": "4", "licenses": []}
    sbom.keep(bom, {"a", "c"}, [inside])
    assert bom["dependencies"] == [
        {"ref": sbom.ROOT_COMPONENT, "dependsOn": ["A==1", "inside"]},
        {"ref": "A==1", "dependsOn": ["c==3"]},
    ]
    rows = sbom.table(bom, "Title").splitlines()[4:]
    assert rows == [
        "| A | 1 | BSD License |",
        "| Inside | 4 | not declared |",
        "| c | 3 | not declared |",
    ]


def test_the_digests_are_those_of_the_files(tmp_path):
    for name in ("b.whl", "a.tar.gz", "SHA256SUMS"):
        (tmp_path / name).write_text(name)
    (tmp_path / "SHA256SUMS").write_text(build.digests(tmp_path))
    assert [line.split()[1] for line in build.digests(tmp_path).splitlines()] == [
        *("a.tar.gz", "b.whl")
    ]
    assert re.fullmatch(r"([0-9a-f]{64}  \S+\n){2}", build.digests(tmp_path))
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0
