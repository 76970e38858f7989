"""Says what a release depends on and under which licences: a CycloneDX file, and a table of it.

`cyclonedx-py` describes the packages of this environment, with the versions of constraints.txt; of
these are kept what the wheel and its extras for users need. What is compiled into it is added.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib import metadata
from typing import TYPE_CHECKING, Any

import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

EXTRAS = ("train", "onnx", "parquet")  # those for users; the others are for development
ROOT_COMPONENT = "root-component"  # what cyclonedx-py calls the project itself
NOT_DECLARED = "not declared"


class SbomError(Exception):
    """What was found and what is expected, in one line."""


def applies(requirement: Requirement, extras: Iterable[str]) -> bool:
    """Whether a package with these extras has the requirement on this platform and Python."""
    if requirement.marker is None:
        return True
    return any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras))


def needed(requirements: Iterable[str], extras: Iterable[str]) -> set[str]:
    """The names of all packages that requirements lead to, as far as they are installed.

    Args:
        requirements: lines like those of `Requires-Dist`.
        extras: of the package that has the requirements.

    Raises:
        SbomError: one that applies here is not installed.
    """
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [(Requirement(text), frozenset(extras)) for text in requirements]
    while waiting:
        requirement, extras = waiting.pop()
        key = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if not applies(requirement, extras) or key in seen:
            continue
        seen.add(key)
        try:
            found = metadata.requires(requirement.name) or []
        except metadata.PackageNotFoundError:
            raise SbomError(
                f"{requirement} is not installed in {sys.prefix}: `make wheel` describes the "
                "packages that are"
            ) from None
        waiting += [(Requirement(text), frozenset(requirement.extras)) for text in found]
    return {name for name, _ in seen}


def licences(component: dict[str, Any]) -> str:
    """The licences that a component declares, in one line."""
    texts = []
    for entry in component.get("licenses", []):
        licence = entry.get("license", {})
        text = entry.get("expression") or licence.get("id") or licence.get("name", "")
        text = text.strip().partition("\n")[0].removeprefix("License :: ")
        texts.append(text.removeprefix("OSI Approved :: ").replace("|", "/"))
    # Names that packages give besides an identifier say the same once more.
    return "; ".join(dict.fromkeys(filter(None, texts))) or NOT_DECLARED


def cuda_runtime() -> dict[str, Any]:
    """The component that is linked into the library."""
    nvcc = shutil.which("nvcc")
    command = [nvcc or "nvcc", "--version"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\S+?),", text)
    return {
        "type": "library",
        "bom-ref": "cuda-runtime-static",
        "name": "NVIDIA CUDA Runtime, linked statically",
        "version": found[1] if found else "unknown",
        "licenses": [{"license": {"name": "NVIDIA Software License Agreement (CUDA Toolkit)"}}],
    }


def keep(bom: dict[str, Any], names: set[str], added: list[dict[str, Any]]) -> None:
    """Leaves of a CycloneDX document the packages `names`, and puts in `added`."""
    bom["components"] = [c for c in bom["components"] if canonicalize_name(c["name"]) in names]
    bom["components"] += added
    kept = {component["bom-ref"] for component in bom["components"]} | {ROOT_COMPONENT}
    graph = [entry for entry in bom["dependencies"] if entry["ref"] in kept]
    for entry in graph:
        entry["dependsOn"] = [ref for ref in entry.get("dependsOn", []) if ref in kept]
        if entry["ref"] == ROOT_COMPONENT:
            entry["dependsOn"] += [component["bom-ref"] for component in added]
    bom["dependencies"] = graph


def table(bom: dict[str, Any], title: str) -> str:
    """A table of the components of a CycloneDX document, in Markdown."""
    rows = sorted((c["name"], c["version"], licences(c)) for c in bom["components"])
    lines = [f"| {name} | {version} | {text} |\n" for name, version, text in rows]
    return f"# {title}\n\n| package | version | licence |\n|---|---|---|\n{''.join(lines)}"


def write(root: Path, out: Path, version: str) -> None:
    """Writes convmae-<version>.cdx.json and convmae-<version>-licences.md.

    Args:
        root: the repository.
        out: the folder of the files.
        version: of the release.

    Raises:
        SbomError: a package that is needed is not installed, or cyclonedx-py failed.
    """
    pyproject = root / "pyproject.toml"
    project = tomllib.loads(pyproject.read_text())["project"]
    requirements = list(project["dependencies"])
    for extra in EXTRAS:
        requirements += project["optional-dependencies"][extra]
    file = out / f"convmae-{version}.cdx.json"
    command = [sys.executable, "-m", "cyclonedx_py", "environment", "--output-reproducible"]
    command += ["--pyproject", str(pyproject), "--output-file", str(file), sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SbomError(f"cyclonedx-py failed: {done.stderr.strip()}")
    bom = json.loads(file.read_text())
    bom["metadata"]["component"]["version"] = version
    keep(bom, needed(requirements, ()), [cuda_runtime()])
    file.write_text(json.dumps(bom, indent=1) + "\n")
    title = f"What convmae {version} needs, with all extras for users, and under which licences"
    (out / f"convmae-{version}-licences.md").write_text(table(bom, title))
