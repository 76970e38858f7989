"""IoU and accuracy of label maps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

pytest.importorskip("torchmetrics")

from convmae.tasks.measures.label_measures import LabelMeasures, confusion_matrix, figures
from convmae.tasks.measures.small_targets import SmallTargets

# Four classes; class 3 is in no label and no prediction, class 2 in predictions only.
TARGET = torch.tensor([[[0, 0, 0, 1], [0, 1, 1, 255]]])
PREDICTION = torch.tensor([[[0, 0, 1, 1], [2, 1, 0, 2]]])


def test_figures_by_hand() -> None:
    measures = LabelMeasures(4)
    measures.update(PREDICTION, TARGET)
    assert measures.matrix.tolist() == [[2, 1, 1, 0], [1, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    found = measures.compute()
    assert found["iou"][:3] == [2 / 5, 2 / 4, 0.0] and math.isnan(found["iou"][3])
    assert found["acc"][:2] == [2 / 4, 2 / 3] and all(map(math.isnan, found["acc"][2:]))
    assert found["miou"] == pytest.approx((2 / 5 + 2 / 4 + 0) / 3)
    assert found["miou_foreground"] == pytest.approx((2 / 4 + 0) / 2)
    assert found["macc"] == pytest.approx((2 / 4 + 2 / 3) / 2)
    assert found["macc_foreground"] == pytest.approx(2 / 3)
    assert found["aacc"] == 4 / 7 and found["pixels"] == 7


def test_sums_over_the_set_and_merges() -> None:
    """Intersections and unions are summed over all pictures before they are divided."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 5, (6, 8, 8), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.1] = 255
    prediction = torch.randint(0, 5, (6, 8, 8), generator=generator)
    whole, first, second = LabelMeasures(5), LabelMeasures(5), LabelMeasures(5)
    for p, t in zip(prediction, target):
        whole.update(p[None], t[None])
    first.update(prediction[:2], target[:2])
    second.update(prediction[2:], target[2:])
    first.merge_state(second)
    valid = target != 255
    for number in range(5):
        of_p, of_t = (prediction == number) & valid, target == number
        expected = (of_p & of_t).sum() / (of_p | of_t).sum()
        assert whole.compute()["iou"][number] == pytest.approx(float(expected))
    assert first.compute() == whole.compute()


def test_nothing_was_counted() -> None:
    found = figures(confusion_matrix(PREDICTION, torch.full_like(TARGET, 255), 4))
    assert math.isnan(found["miou"]) and math.isnan(found["aacc"]) and found["pixels"] == 0


def test_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"prediction \[1, 2, 4\] and target \[2, 4\]"):
        LabelMeasures(4).update(PREDICTION, TARGET[0])


def count_in_a_process(rank: int, folder: str) -> tuple[str, str]:
    """One of two processes that count a picture each; what it knows of both, as text."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/together", rank=rank, world_size=2
    )
    labels, targets = LabelMeasures(4), SmallTargets()
    for measures in (labels, targets):
        measures.update(PREDICTION, TARGET if rank else torch.zeros_like(TARGET))
    found = str(labels.compute()), str(targets.compute())  # as text, in which NaN equals NaN
    torch.distributed.destroy_process_group()
    return found


def count_in_another_process(number: int, folder: str) -> None:
    Path(folder, "found").write_text("\n".join(count_in_a_process(1, folder)))


@pytest.mark.thorough
def test_two_processes_tell_the_figures_of_both(tmp_path: Path) -> None:
    other: Any = mp.spawn(count_in_another_process, (str(tmp_path),), nprocs=1, join=False)
    found = count_in_a_process(0, str(tmp_path))
    while not other.join():
        pass
    labels, targets = LabelMeasures(4), SmallTargets()
    for measures in (labels, targets):
        measures.update(PREDICTION, torch.zeros_like(TARGET))
        measures.update(PREDICTION, TARGET)
    assert found == (str(labels.compute()), str(targets.compute()))
    assert (tmp_path / "found").read_text().splitlines() == list(found)
