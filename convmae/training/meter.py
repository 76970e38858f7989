"""How fast a run goes, and what it waits for."""

from __future__ import annotations

from typing import Any


class Meter:
    """How fast the model computes and how fast pictures arrive, since the last line of the log."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.clear()

    def clear(self) -> None:
        self.images = 0
        self.prepared = self.waited = self.stepped = 0.0  # seconds

    def batch(self, images: int, prepared: float, waited: float) -> None:
        """A batch took `prepared` seconds in its own process, and `waited` to arrive here."""
        self.images += images
        self.prepared += prepared
        self.waited += waited

    def rates(self, processes: int) -> dict[str, Any]:
        """Images a second of both, for all processes together, and which one is slower."""
        computing = max(self.stepped - self.waited, 1e-9)
        model = processes * self.images / computing
        pipeline = processes * self.images * max(self.workers, 1) / max(self.prepared, 1e-9)
        return {
            "model_images_per_s": round(model, 2),
            "input_images_per_s": round(pipeline, 2),
            "bottleneck": "input" if pipeline < model else "model",
        }
