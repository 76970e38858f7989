"""Who may import whom, and that both packages work without what they can do without."""

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from convmae_kernels.ops.support.dispatch import (
    LIBRARY_FILE,
    WHY_NOT_COMPILED,
    WHY_NOT_TRITON,
    why_not,
)
from tests.support.paths import ROOT

pytestmark = pytest.mark.thorough(but_every=3)  # a sample of long sweeps

KERNELS, MODELS, BENCHMARKS = ROOT / "convmae_kernels", ROOT / "convmae", ROOT / "benchmarks"
OPTIONAL = [
    *("triton", "torchvision", "timm", "PIL", "tqdm", "tensorboard", "safetensors", "tyro"),
    *("matplotlib", "skimage", "scipy", "webdataset", "wandb", "yaml", "hypothesis", "pytest"),
    "pyarrow",
]
OPS = [
    *("gather_visible", "gather_windows", "gather_windows_grad", "masked_conv2d"),
    *("masked_conv2d_weight_grad", "scatter_visible"),
    *("strided_conv2d", "strided_conv2d_input_grad", "strided_conv2d_weight_grad"),
]


def blocker(names):
    """Code after which no package of these names can be imported."""
    return f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

sys.meta_path.insert(0, Blocker())
"""


BLOCKER = blocker(OPTIONAL)
USE = """
import torch, convmae_kernels as ck
mask = ck.BlockMask.random(2, (3, 4), 0.5)
conv = ck.nn.MaskedConv2d(3, 3, 5, groups=3)
conv(torch.randn(2, 3, 12, 16, requires_grad=True), mask).sum().backward()
assert conv.weight.grad.isfinite().all()
print(ck.__file__)
print(ck.info()["cpu"])
"""


def python(code, path=ROOT, *arguments):
    """Runs code in a fresh interpreter; returns the lines that it printed."""
    environment = {**os.environ, "PYTHONPATH": str(path)}
    done = subprocess.run(
        [sys.executable, *(arguments or ("-c", code))],
        capture_output=True,
        text=True,
        env=environment,
        cwd=path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


# -- arrows -------------------------------------------------------------------------------------


def module_name(file):
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file, annotations=True):
    """`(module, lazy)` of every import in a file; lazy: inside a function or for type checkers.

    Without `annotations` those for type checkers are left out.
    """
    tree = ast.parse(file.read_text())
    lazy, left_out = set(), set()
    for node in ast.walk(tree):
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if typing_only and not annotations:
            left_out.update(id(n) for part in node.body for n in ast.walk(part))
        if typing_only or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lazy.update(map(id, ast.walk(node)))
    package = module_name(file) if file.stem == "__init__" else module_name(file).rpartition(".")[0]
    for node in ast.walk(tree):
        if id(node) in left_out:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(base, package)
            # `from package import module` imports the module.
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from ((name, id(node) in lazy) for name in names)


def within(name, *packages):
    return any(name == package or name.startswith(package + ".") for package in packages)


def all_imports(package):
    files = [f for f in sorted(package.rglob("*.py")) if "__pycache__" not in f.parts]
    assert files, f"no Python files in {package}"
    return [(module_name(file), *found) for file in files for found in imports(file)]


def test_kernels_never_import_models():
    wrong = [(a, b) for a, b, _ in all_imports(KERNELS) if within(b, "convmae")]
    assert not wrong


INSIDE = "convmae_kernels"
PACKED_FUNCTIONS = [
    *("block_mask", "functional", "ops", "packed.axes", "packed.map_like", "packed.packed"),
]
MAY_IMPORT = {  # what each module of the package may import from the package
    "recording": [],
    "torch_version": [],
    "zorder": [],
    "block_mask": ["recording", "ops.reference"],
    "ops.support": ["zorder", "ops.support"],
    "ops.support.autocast": [],
    "ops.support.dtypes": [],
    "ops.reference": ["zorder", "ops.support.autocast", "ops.support.dtypes"],
    "ops.support.geometry": [],
    "ops.support.conv_plan": ["ops.support.geometry"],
    "ops.support.checks": ["zorder", "block_mask", "ops.support.dtypes"],
    "ops.support.flops": [],
    "ops.support.choices": [],
    "ops.support.dispatch": [
        *("block_mask", "ops.support.choices", "ops.support.flops", "triton"),
    ],
    "ops.support.rows": ["recording", "ops.support.dispatch", "ops.support.dtypes"],
    "ops": ["zorder", "block_mask", "ops", "triton"],
    "triton": ["block_mask", "triton"],
    "functional": ["block_mask", "zorder", "functional", "ops"],
    "packed.axes": [],
    "packed.map_like": [],
    "packed.packed": [
        *("zorder", "block_mask", "functional", "ops", "packed.axes", "packed.map_like"),
    ],
    "packed.functions": PACKED_FUNCTIONS,
    "packed.view_functions": ["zorder", *PACKED_FUNCTIONS],
    "packed.channel_functions": ["zorder", "packed.view_functions", *PACKED_FUNCTIONS],
    "packed.reductions": PACKED_FUNCTIONS,
    "packed.products": PACKED_FUNCTIONS,
    "packed.refused": [],
    "packed.padded": ["functional", "packed.axes", "packed.map_like", "packed.packed"],
    "packed.position_functions": [
        *("zorder", "packed.padded", "packed.refused", *PACKED_FUNCTIONS),
    ],
    "packed.masked_dense": ["block_mask", "ops", "packed.axes", "packed.map_like"],
    "packed.dense_channels": ["packed.axes", "packed.map_like", "packed.masked_dense"],
    "packed.masked_dense_positions": [
        *("ops", "packed.axes", "packed.map_like", "packed.masked_dense", "packed.refused"),
    ],
    "packed.rehearsal": ["block_mask", "zorder", "packed.map_like", "packed.packed"],
    "packed.equivalence": [
        *("block_mask", "ops", "packed.map_like", "packed.masked_dense", "packed.packed"),
    ],
    "packed.sparsify": [
        *("block_mask", "ops", "recording", "packed.map_like", "packed.packed", "packed.rehearsal"),
    ],
    "packed": ["packed"],
    "nn": ["block_mask", "functional", "ops", "packed", "recording"],
    "explanation": ["ops"],
    "explain": ["block_mask", "explanation", "ops", "zorder"],
    "info": ["ops"],
    "testing": ["block_mask", "ops"],
    "measure": ["block_mask", "explain", "ops"],
    "__main__": ["info", "measure"],
}


def test_arrows_inside_the_kernels():
    wrong = []
    for module, name, _ in all_imports(KERNELS):
        if module == INSIDE or not within(name, INSIDE) or name == INSIDE:
            continue
        own = module.removeprefix(INSIDE + ".")
        rule = max((r for r in MAY_IMPORT if within(own, r)), key=len, default=None)
        assert rule is not None, f"{module}: no rule says what it may import"
        # A name may be a module or something in it: the module it comes from has the rule.
        if not within(name, *(f"{INSIDE}.{r}" for r in MAY_IMPORT[rule])) and name != module:
            wrong.append((module, name))
    wrong = [(a, b) for a, b in wrong if b != f"{INSIDE}.ops" or a != f"{INSIDE}.ops"]
    assert not wrong


ROOMS = (  # of convmae, from the top: each may import from those of the lines below its own
    ("__init__", "__main__"),
    ("cli",),
    ("commands",),
    ("tasks",),
    ("training",),
    ("records", "weights"),
    ("data",),
    ("models",),
    ("config", "files", "seeds"),
)


def test_arrows_inside_convmae():
    """From the top to the bottom, in type annotations and inside functions as well."""
    floor = {room: number for number, rooms in enumerate(ROOMS) for room in rooms}
    wrong = []
    for module, name, _ in all_imports(MODELS):
        if module == "convmae" or not within(name, "convmae"):
            continue
        if name == "convmae" or name.startswith("convmae.__"):
            wrong.append((module, name))  # the table of public names is for users
            continue
        own, other = module.split(".")[1], name.split(".")[1]
        assert {own, other} <= floor.keys(), f"{module} or {name} is in no room"
        if own != other and floor[own] >= floor[other]:
            wrong.append((module, name))
    wrong = [(a, b) for a, b in wrong if (a, b) != ("convmae.models.timm_models", "convmae")]
    assert not wrong


@pytest.mark.parametrize("package", [KERNELS, MODELS, BENCHMARKS], ids=lambda p: p.name)
def test_no_circles(package):
    """No module needs itself to be imported, wherever the import stands; annotations aside."""
    files = {module_name(f): f for f in package.rglob("*.py") if "__pycache__" not in f.parts}
    arrows = {
        module: {
            name
            for name in (n for n, _ in imports(file, annotations=False))
            if name in files and not within(module, name)
        }
        for module, file in files.items()
    }

    def reached(module):
        seen, waiting = set(), list(arrows[module])
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                waiting += arrows[name]
        return seen

    assert not [module for module in arrows if module in reached(module)]


def test_the_oracle_lends_no_code():
    """Of `reference`, ops use what it says an op means, and nothing that helps it to say so."""
    used = set()
    for file in sorted((KERNELS / "ops").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.module != f"{INSIDE}.ops.reference", f"{file} imports from reference"
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "reference":
                used.add(node.attr)
    ops = {name for name in used if hasattr(torch.ops.convmae, name)}
    assert used == ops
    assert {"masked_conv2d", "gather_windows"} <= used


@pytest.mark.parametrize("package", [KERNELS, MODELS], ids=lambda p: p.name)
def test_top_level_imports(package):
    """What is needed to import the core of a package: the standard library, torch and numpy."""
    core = {"torch", "numpy", "convmae_kernels", *sys.stdlib_module_names}
    if package is MODELS:
        core |= {"convmae"}
    extras = (*("convmae.data", "convmae.training", "convmae.records", "convmae.weights"),)
    extras += ("convmae.tasks", "convmae.commands", "convmae.cli", "convmae_kernels.triton")
    extras += ("convmae.models.timm_models", "convmae.models.dense_tasks.rcnn")
    wrong = [
        (module, name)
        for module, name, lazy in all_imports(package)
        if not lazy and not within(module, *extras) and name.partition(".")[0] not in core
    ]
    assert not wrong


# -- fresh interpreters -------------------------------------------------------------------------


@pytest.mark.parametrize("package", ["convmae_kernels", "convmae_kernels.testing", "convmae"])
def test_import_with_torch_and_numpy_only(package):
    lines = python(
        f"{BLOCKER}\nimport {package}\n"
        f"print([name for name in {OPTIONAL!r} if name in sys.modules])"
    )
    assert lines[-1] == "[]"


@pytest.mark.thorough
def test_only_their_users_need_the_command_line_shards_and_wandb():
    """Every module can be imported without these; without others only if they are not there."""
    names = ["tyro", "webdataset", "wandb", "pyarrow"]
    lines = python(
        blocker(names) + "import importlib, pkgutil, benchmarks, convmae\nfound = {}\n"
        "for package in (convmae, benchmarks):\n"
        "    for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "        try: found[module.name] = importlib.import_module(module.name)\n"
        "        except ModuleNotFoundError as error: found[module.name] = error.name\n"
        f"print([name for name, what in found.items() if what in {names!r}])\n"
        "print('convmae.cli' in found, 'benchmarks.runner' in found)"
    )
    assert lines[-2:] == ["[]", "True True"]


@pytest.fixture(scope="module")
def imported():
    """Of a process that imports the kernels and does nothing else: what came with them, and for
    every op who has the keys of devices."""
    heavy = ["triton", "torch._inductor", "torch.utils.cpp_extension", "torchvision", "convmae"]
    has = "torch._C._dispatch_has_kernel_for_dispatch_key"
    first, *others = python(
        "import sys, torch\nbefore = set(sys.modules)\nimport convmae_kernels\n"
        f"print([name for name in {heavy!r} if name in set(sys.modules) - before])\n"
        f"for name in {OPS!r}:\n"
        f"    print({has}('convmae::' + name, 'CUDA'), {has}('convmae_triton::' + name, 'CUDA'),\n"
        f"          {has}('convmae_triton::' + name, 'CPU'))"
    )
    return first, others


def test_import_leaves_triton_and_the_compiler_alone(imported):
    assert imported[0] == "[]"


ASK_FOR_TRITON = """
mask = ck.BlockMask.full(1, (1, 1))
try:
    ck.gather_visible(torch.zeros(1, 1, 4, 4), mask, impl="triton")
except RuntimeError as error:
    print(error)
print(ck.info()["triton"])
"""


@pytest.mark.parametrize("block", [BLOCKER, 'import sys\nsys.modules["triton"] = None\n'])
def test_without_triton(block):
    *_, message, info = python(block + USE + ASK_FOR_TRITON)
    assert message.startswith("impl='triton' cannot run: triton is not installed; ")
    assert info == "no: " + message.partition("cannot run: ")[2]


@pytest.mark.skipif(WHY_NOT_TRITON is not None, reason="triton is not installed")
def test_with_triton_and_without_a_gpu():
    *_, message, info = python(
        "import os\nos.environ['CUDA_VISIBLE_DEVICES'] = ''\n" + USE + ASK_FOR_TRITON
    )
    assert message == "impl='triton' cannot run: the tensor is on cpu, not on a GPU"
    assert info.startswith("no: triton ")
    assert info.endswith(" is installed, but PyTorch finds no GPU")


def test_who_has_the_cuda_key(imported):
    """The compiled library if it has CUDA kernels, else Triton; Triton alone in its own library."""
    triton = WHY_NOT_TRITON is None
    compiled = WHY_NOT_COMPILED is None and torch.ops.convmae.cuda_architectures() != ""
    assert imported[1] == [f"{compiled or triton} {triton} False"] * len(OPS)


@pytest.mark.thorough
def test_a_compiled_cuda_kernel_is_not_replaced(copy_without_library):
    """What the compiled library registers is there before the ops are defined."""
    lines = python(
        "import torch\n"
        "library = torch.library.Library('convmae', 'IMPL')\n"
        "library.impl('gather_visible', lambda *arguments: 'compiled', 'CUDA')\n"
        "import convmae_kernels\n"
        "kernel = torch.library.get_kernel('convmae::gather_visible', 'CUDA')\n"
        "keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)\n"
        "try: kernel.call_boxed(keys, torch.zeros(1, 1, 1, 1), torch.zeros(1).long(), 1, 1)\n"
        "except RuntimeError as error: print(error)\n",
        copy_without_library,
    )
    assert lines == ["Unable to cast compiled to Tensor"]


@pytest.mark.thorough
def test_info_as_a_command():
    lines = python("", ROOT, "-m", "convmae_kernels")
    assert [line.split()[0] for line in lines] == [
        *("torch", "threads", "reference", "cpu", "cuda", "triton")
    ]
    assert torch.__version__ in lines[0]


# -- the compiled library -----------------------------------------------------------------------


@pytest.fixture
def copy_without_library(tmp_path):
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(KERNELS, tmp_path / "convmae_kernels", ignore=ignore)
    return tmp_path


def test_without_the_compiled_library(copy_without_library):
    asked = (
        "mask = ck.BlockMask.full(1, (1, 1))\n"
        "try: ck.gather_visible(torch.zeros(1, 1, 4, 4), mask, impl='cpu')\n"
        "except RuntimeError as error: print(error)"
    )
    file, cpu, message = python(USE + asked, copy_without_library)[-3:]
    assert Path(file).is_relative_to(copy_without_library)
    assert cpu.startswith("no: the compiled library ")
    assert message == f"impl='cpu' cannot run: {cpu.removeprefix('no: ')}"


@pytest.mark.thorough
def test_with_a_library_that_does_not_load(copy_without_library):
    (copy_without_library / "convmae_kernels" / LIBRARY_FILE.name).write_bytes(b"not a library")
    cpu = python(USE, copy_without_library)[-1]
    assert cpu.startswith("no: the compiled library could not be loaded: ")


@pytest.mark.skipif(
    os.environ.get("CONVMAE_REQUIRE_EXT", "0") in ("", "0"),
    reason="CONVMAE_REQUIRE_EXT=1 demands the compiled library",
)
def test_the_compiled_library_is_there():
    assert why_not("cpu", torch.zeros(1)) is None
