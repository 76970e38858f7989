"""What `ck.explain` found, and how it reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from convmae_kernels.ops.support.conv_plan import ConvPlan


@dataclass(frozen=True)
class Step:
    """One op of a call.

    Attributes:
        phase: "forward" or "backward".
        op: its name without the library.
        implementation: "cuda", "triton", "cpu", "reference", or "pytorch" for PyTorch's own ops.
        kernel: the name of the CUDA kernel, where there are several.
        reason: why that implementation, and why that kernel.
        plan: how the work is cut: tiles, runs and slices, by name.
        bytes: that it reads and writes, each tensor once, the shares of runs included.
    """

    phase: str
    op: str
    implementation: str
    kernel: str | None
    reason: str
    plan: dict[str, str]
    bytes: int

    def __str__(self) -> str:
        kernel = f", kernel {self.kernel!r}" if self.kernel else ""
        reason = f": {self.reason}" if self.reason else ""
        cut = f"\n    {self._cut()}" if self.plan else ""
        return f"{self.op}: {self.implementation}{kernel}{reason}{cut}"

    def _cut(self) -> str:
        """How the work is cut, in words."""
        plan = self.plan
        words = [f"{plan['access_bytes']} bytes at a time"]
        if plan["tile_side"] != "0":
            side = plan["tile_side"]
            words.append(f"{plan['tiles']} tiles of {side} x {side}, {plan['slices']} slices")
        if "runs" in plan:
            words.append(f"{plan['runs']} runs of {plan['tiles_per_run']}")
        if "held" in plan:
            words.append(f"{plan['held']} thread blocks held, by {plan['held_by']}")
        if "share_bytes" in plan:
            words.append(f"shares of {megabytes(int(plan['share_bytes']))}")
        return ", ".join(words)


@dataclass(frozen=True)
class Explanation:
    """What runs a call; `print` shows it.

    Attributes:
        call: the op and its sizes, in words.
        device: what it runs on.
        plan: of a convolution, the way it is computed; else None.
        implementations: "yes ..." or "no: why" of each, on that device.
        steps: the ops in their order, those that move nothing left out.
        floors: by phase, the bytes that must move: arguments and results, each once.
        notes: what else there is to know.
    """

    call: str
    device: str
    plan: ConvPlan | None
    implementations: dict[str, str]
    steps: tuple[Step, ...]
    floors: dict[str, int]
    notes: tuple[str, ...] = field(default=())

    def bytes(self, phase: str) -> int:
        """What the ops of a phase read and write together."""
        return sum(step.bytes for step in self.steps if step.phase == phase)

    def __str__(self) -> str:
        lines = [f"{self.call}\non {self.device}"]
        if self.plan is not None:
            lines.append(f"way {self.plan.way!r}: {self.plan.description}")
        lines += [f"{name:9} {said}" for name, said in self.implementations.items()]
        for phase, floor in self.floors.items():
            moved = self.bytes(phase)
            ratio = f", {moved / floor:.2f} times its floor of {megabytes(floor)}" if floor else ""
            lines.append(f"{phase}: {megabytes(moved)}{ratio}")
            together: dict[str, list[int]] = {}
            for step in self.steps:
                if step.phase == phase:
                    together.setdefault(str(step), []).append(step.bytes)
            for step_words, moves in together.items():
                times = f"{len(moves)} times, " if len(moves) > 1 else ""
                lines.append(f"  {times}{megabytes(sum(moves))} {step_words}")
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def megabytes(count: int) -> str:
    """Bytes in words, "12.3 MB"."""
    return f"{count / 1e6:.3g} MB" if count < 1e9 else f"{count / 1e9:.3g} GB"
