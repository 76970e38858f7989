"""Names of models for dense tasks: `segment:convvit_tiny`, `detect:timm:resnet50`."""

from __future__ import annotations

SEGMENT, DETECT = "segment:", "detect:"


def split_task(name: str) -> tuple[str, str]:
    """`("segment:", "convvit_tiny")` of `"segment:convvit_tiny"`; `("", name)` of other names."""
    for prefix in (SEGMENT, DETECT):
        if name.startswith(prefix):
            return prefix, name.removeprefix(prefix)
    return "", name
