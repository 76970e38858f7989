"""Which networks of timm and torchvision run on visible blocks, and why the others do not.

    python docs/survey.py                       # all of them, in an hour; goes on where it was
    python docs/survey.py "resnet*" "regnet*"   # names that match one of the patterns
    python docs/survey.py --table > docs/generated/survey.md

Every architecture is built with random weights, without its classifier, and looked at in two ways.
What it is: a run on shapes alone tells whether there are convolutions that look at neighbours, and
products of two maps (attention). Whether it is exact: `check_equivalence` compares the packed run
with the dense one, every module's output, all gradients and buffers, in float64, in training mode.
The results go to `docs/generated/survey.json`, one entry a name.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import multiprocessing
import multiprocessing.connection
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

if __name__ == "__main__":  # run as a script, the packages beside it are not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import convmae_kernels as ck
from convmae_kernels.packed import EquivalenceError

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "generated" / "survey.json"
TORCHVISION = "torchvision:"
BLOCK, GRID, BATCH, VISIBLE = 32, 3, 2, 4  # pixels; blocks a side; pictures; blocks of each
IN_FLOAT64 = 240e6  # parameters; of larger networks four float64 copies may not fit into memory
LARGEST = 400e6  # parameters; larger networks are wider or deeper kinds of others, and not run
TOO_LARGE = f"of more than {LARGEST / 1e6:.0f} million parameters"
SECONDS = 900  # for one network

CONVOLUTIONAL, ATTENTION, OTHER = "convolutional", "with attention", "without convolutions"
EXACT, REFUSED, DEVIATES, FAILED = "exact", "refused", "deviates", "failed"
NOT_RUN = "not run"


# -- what a network is ----------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """Notes whether two computed maps are multiplied as matrices, as attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if "scaled_dot_product" in name or "flash_attention" in name:
            self.found = True
        if name.startswith(("aten.bmm", "aten.baddbmm")):
            self.found |= not any(_is_weight(x) for x in args if isinstance(x, Tensor))
        return func(*args, **(kwargs or {}))


def _is_weight(x: Tensor) -> bool:
    """Whether it is a parameter, or a view of one."""
    base = x if x._base is None else x._base
    return isinstance(base, nn.Parameter)


def build(name: str, device: str = "cpu", **options: Any) -> tuple[nn.Module, Any]:
    """The network without its classifier, and the function of a map that gives its last map."""
    torch.manual_seed(0)
    with warnings.catch_warnings(), torch.device(device):
        warnings.simplefilter("ignore")
        if name.startswith(TORCHVISION):
            lone = {"aux_logits": False} if "inception" in name or "googlenet" in name else {}
            model = torchvision.models.get_model(name[len(TORCHVISION) :], weights=None, **lone)
            model = _features_of_torchvision(model)
            return model, model
        model = timm.create_model(name, num_classes=0, **options)
    return model, model.forward_features


def build_for_grid(name: str) -> nn.Module:
    """The network for pictures of the survey, where it must be told their size."""
    if not name.startswith(TORCHVISION):
        try:
            return build(name, img_size=GRID * BLOCK)[0]
        except (TypeError, ValueError, AssertionError, RuntimeError):
            pass  # it takes any size, or does not take this one
    return build(name)[0]


def _features_of_torchvision(model: nn.Module) -> nn.Module:
    """What stands before the pooling and the classifier."""
    if hasattr(model, "features"):
        return model.features
    heads = ("avgpool", "fc", "dropout", "classifier", "head", "heads", "AuxLogits", "flatten")
    parts = [child for key, child in model.named_children() if not key.startswith(heads)]
    return nn.Sequential(*parts)


def kind_of(name: str) -> str:
    """What the network is, from a run on shapes alone where it can be built without values."""
    try:
        return _kind(*build(name, "meta"), "meta")
    except (NotImplementedError, RuntimeError):
        return _kind(*build(name), "cpu")


def _kind(model: nn.Module, features: Any, device: str) -> str:
    model.eval()
    spatial = any(
        isinstance(m, nn.Conv2d) and max(m.kernel_size) > max(*m.stride, 1) for m in model.modules()
    )
    if not spatial:
        return OTHER
    settings = getattr(model, "default_cfg", None) or {}
    size = settings.get("input_size", (3, 224, 224))
    with Products() as products, torch.no_grad():
        features(torch.zeros(1, *size, device=device))
    return ATTENTION if products.found else CONVOLUTIONAL


# -- whether it is exact --------------------------------------------------------------------------


class _Features(nn.Module):
    """The network as a module whose forward gives its last map."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Any) -> Any:
        return self.model.forward_features(x)


def survey(name: str) -> dict[str, Any]:
    """What `name` is, and whether it is exact on visible blocks."""
    began = time.perf_counter()
    try:
        kind = kind_of(name)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AssertionError) as error:
        kind = f"unknown: {_first_line(error)}"
    found: dict[str, Any] = {"kind": kind}
    if kind != OTHER:
        found |= compare(name)
    return found | {"seconds": round(time.perf_counter() - began, 1)}


def compare(name: str) -> dict[str, Any]:
    """Packed against dense, in training mode."""
    try:
        parameters = _parameters(build(name, "meta")[0])
        model = None
    except (NotImplementedError, RuntimeError):  # it cannot be built without values
        model = build_for_grid(name)
        parameters = _parameters(model)
    if parameters > LARGEST:
        return {"parameters": parameters, "result": NOT_RUN, "reason": TOO_LARGE}
    model = model or build_for_grid(name)
    dtype = torch.float64 if parameters <= IN_FLOAT64 else torch.float32
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 3, GRID * BLOCK, GRID * BLOCK, generator=generator)
    noise = torch.rand(BATCH, GRID**2, generator=generator)
    mask = ck.BlockMask.from_noise(noise, (GRID, GRID), 1 - VISIBLE / GRID**2)
    network = model if name.startswith(TORCHVISION) else _Features(model)
    facts = {"parameters": parameters, "dtype": str(dtype)[6:]}
    try:
        found = ck.check_equivalence(network.train(), images, mask, dtype=dtype)
    except (NotImplementedError, TypeError, ValueError) as error:
        return facts | {"result": REFUSED, "reason": _first_line(error)}
    except EquivalenceError as error:
        return facts | {"result": DEVIATES, "reason": _first_line(error)}
    except (RuntimeError, AttributeError, IndexError, AssertionError) as error:
        return facts | {"result": FAILED, "reason": f"{type(error).__name__}: {_first_line(error)}"}
    error = max(found.outputs, found.gradients, found.buffers)
    return facts | {"result": EXACT, "error": error}


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _first_line(error: Exception) -> str:
    text = str(error).partition(";")[0].strip()
    return text.splitlines()[0] if text else type(error).__name__


# -- all of them ----------------------------------------------------------------------------------


def all_names() -> list[str]:
    """Of timm, and of torchvision with a prefix."""
    names = timm.list_models()
    return names + [TORCHVISION + n for n in torchvision.models.list_models(torchvision.models)]


class Examination:
    """`survey` of one network in a process of its own, which may need more memory than there is.

    The process is a fork of this one, so that nothing is imported again.
    """

    def __init__(self, name: str) -> None:
        self.name, self.began = name, time.monotonic()
        self.answer, sender = multiprocessing.Pipe(duplex=False)
        self.process = multiprocessing.get_context("fork").Process(
            target=_send_survey, args=(name, sender)
        )
        self.process.start()
        sender.close()

    def result(self) -> dict[str, Any]:
        """What it found; waits for it."""
        found = {"kind": "unknown", "result": FAILED, "reason": f"longer than {SECONDS} s"}
        try:
            if self.answer.poll(max(0.0, self.began + SECONDS - time.monotonic())):
                found = self.answer.recv()
        except EOFError:
            self.process.join()
            found["reason"] = f"its process ended with status {self.process.exitcode}"
        self.process.kill()
        self.process.join()
        return found


def _send_survey(name: str, sender: Any) -> None:
    torch.set_num_threads(1)
    sender.send(survey(name))


def run(patterns: list[str], workers: int, again: bool) -> None:
    """Surveys what matches, and is not in the results of these versions yet."""
    versions = {"timm": timm.__version__, "torchvision": torchvision.__version__.split("+")[0]}
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if results.get("versions") != versions:
        results = {"versions": versions, "networks": {}}
    networks = results["networks"]
    chosen = [n for n in all_names() if any(fnmatch.fnmatch(n, p) for p in patterns)]
    due = [n for n in chosen if again or n not in networks]
    running: list[Examination] = []
    for number, name in enumerate([*due, *[None] * workers], start=1 - workers):
        if len(running) == workers or (name is None and running):
            answers = [e.answer for e in running]
            oldest = min(e.began for e in running)
            ready = multiprocessing.connection.wait(answers, oldest + SECONDS - time.monotonic())
            done = next((e for e in running if e.answer in ready), running[0])
            running.remove(done)
            networks[done.name] = found = done.result()
            said = found.get("result", found["kind"])
            print(f"{number}/{len(due)} {done.name}: {said} {found.get('reason', '')}", flush=True)
            RESULTS.write_text(json.dumps(results, indent=0, sort_keys=True) + "\n")
        if name is not None:
            running.append(Examination(name))


# -- the table ------------------------------------------------------------------------------------


def table(results: dict[str, Any]) -> str:
    """The results as a page."""
    networks: dict[str, dict[str, Any]] = results["networks"]
    lines = [
        "# Which networks run on visible blocks",
        "",
        f"timm {results['versions']['timm']}, torchvision {results['versions']['torchvision']}: "
        f"{len(networks)} architectures, random weights, the part before the classifier, "
        f"{BATCH} pictures of {GRID * BLOCK} x {GRID * BLOCK} pixels, {VISIBLE} of {GRID**2} "
        "blocks visible, training mode. `exact`: every module's output, all gradients and all "
        "buffers of the packed run are those of the dense run, by `check_equivalence`. Made by "
        "`python docs/survey.py`; each network is in `docs/generated/survey.json`.",
        "",
        "| what it is | number | exact | refused | deviates or failed | not run |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for kind in (CONVOLUTIONAL, ATTENTION):
        counts = Counter(n["result"] for n in networks.values() if n["kind"] == kind)
        total = sum(counts.values())
        share = f" ({counts[EXACT] / total:.0%})" if total else ""
        lines.append(
            f"| {kind} | {total} | {counts[EXACT]}{share} | {counts[REFUSED]} | "
            f"{counts[DEVIATES] + counts[FAILED]} | {counts[NOT_RUN]} |"
        )
    others = sum(n["kind"] == OTHER for n in networks.values())
    lines += [f"| {OTHER} that look at neighbours | {others} | | | | |", ""]
    for kind in (CONVOLUTIONAL, ATTENTION):
        for result in (REFUSED, DEVIATES, FAILED, NOT_RUN):
            lines += _reasons(networks, kind, result)
    return "\n".join(lines) + "\n"


def _reasons(networks: dict[str, dict[str, Any]], kind: str, result: str) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for name, found in networks.items():
        if found["kind"] == kind and found.get("result") == result:
            reasons.setdefault(found["reason"], []).append(name)
    if not reasons:
        return []
    lines = [f"## {kind.capitalize()}: {result}", "", "| reason | networks |", "|---|---|"]
    for reason, names in sorted(reasons.items(), key=lambda item: -len(item[1])):
        shown = ", ".join(f"`{name}`" for name in names[:12])
        more = f" and {len(names) - 12} more" if len(names) > 12 else ""
        lines.append(f"| {reason.replace('|', chr(92) + '|')} | {shown}{more} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("patterns", nargs="*", default=["*"], help="names of networks")
    parser.add_argument("--workers", type=int, default=2, help="processes at a time")
    parser.add_argument("--again", action="store_true", help="those in the results, too")
    parser.add_argument("--table", action="store_true", help="print the page and run nothing")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads(RESULTS.read_text())), end="")
    else:
        run(arguments.patterns or ["*"], arguments.workers, arguments.again)


if __name__ == "__main__":
    main()
