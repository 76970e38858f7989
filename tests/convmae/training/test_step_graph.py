"""Whole steps as a graph, with a stand-in for the capture: what it repeats is the function."""

import dataclasses
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import convmae_kernels as ck
from convmae import pretrain
from convmae.training import setup
from convmae.training.loop import StepResult
from convmae.training.step_graph import WARM_UP, GraphError, StepGraph, why_not
from tests.support.training_runs import curve, interrupt_after, options, same, tensors


class Captures:
    """Stands in for `cuda_capture`; counts captures and replays."""

    def __init__(self, fails=False):
        self.captured = self.replayed = 0
        self.fails = fails

    def __call__(self, function):
        self.captured += 1
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")

        def replay():
            self.replayed += 1
            function()

        return replay


@pytest.fixture
def captures(monkeypatch):
    stand_in = Captures()
    monkeypatch.setattr(setup, "why_not", lambda run: None)
    monkeypatch.setattr(setup, "cuda_capture", stand_in)
    return stand_in


def close(found, wanted):
    assert [point[0] for point in found] == [point[0] for point in wanted]
    for column in (2, 3):  # losses and learning rates; these are float32 in a graph
        values = [point[column] for point in wanted]
        assert [point[column] for point in found] == pytest.approx(values, rel=1e-5)


def test_the_losses_are_those_without_a_graph(pictures, tmp_path, captures, capsys):
    common = {"epochs": 3, "amp": "float32", "clip_grad": 0.5}
    pretrain(options(pictures, tmp_path / "plain", **common))
    pretrain(options(pictures, tmp_path / "graph", cuda_graph=True, **common))
    assert f"steps are captured after the first {WARM_UP}" in capsys.readouterr().out
    assert (captures.captured, captures.replayed) == (1, 9 - WARM_UP)
    close(curve(tmp_path / "graph"), curve(tmp_path / "plain"))


def test_a_run_with_graphs_is_interrupted_and_resumed(pictures, tmp_path, captures, monkeypatch):
    config = options(pictures, tmp_path / "plain", epochs=4, amp="float32")
    pretrain(config)
    parts = dataclasses.replace(config, output_dir=str(tmp_path / "parts"), cuda_graph=True)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)  # steps of a graph do not come by: without it, then with it
        pretrain(dataclasses.replace(parts, cuda_graph=False))
    pretrain(dataclasses.replace(parts, resume="auto"))
    assert captures.replayed == 12 - 1 - WARM_UP
    close(curve(tmp_path / "parts"), curve(tmp_path / "plain"))


def test_a_failed_capture_goes_on_without(pictures, tmp_path, captures, capsys):
    captures.fails = True
    common = {"epochs": 2, "amp": "float32"}
    pretrain(options(pictures, tmp_path / "plain", **common))
    pretrain(options(pictures, tmp_path / "graph", cuda_graph=True, **common))
    note = f"from step {WARM_UP + 1} on without a graph: the capture failed: operation not"
    assert note in capsys.readouterr().out and captures.captured == 1
    close(curve(tmp_path / "graph"), curve(tmp_path / "plain"))


# -- why a run cannot -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"device": "cpu"}, "the device is cpu, and CUDA graphs need an NVIDIA GPU (--device cuda)")],
)
def test_a_run_that_cannot_says_why(pictures, tmp_path, capsys, changes, reason):
    pretrain(options(pictures, tmp_path / "run", epochs=1, cuda_graph=True, **changes))
    assert f"note: --cuda_graph: steps run without a graph: {reason}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "world", "scales", "reason"),
    [
        ({"accum_iter": 2}, 1, False, "--accum_iter 2 adds up .* larger --batch_size and"),
        ({"grad_checkpointing": True}, 1, False, "--grad_checkpointing reads the states of random"),
        ({}, 1, True, "float16 scales its loss .* --amp bfloat16 or float32"),
        ({}, 2, False, r"there are 2 processes \(ddp\), .* without torchrun"),
        ({"opt": "sgd"}, 1, False, "SGD decides on the host in every step, .* --opt adamw"),
        ({"weight_decay_end": 0.2}, 1, False, "the weight decay, which --weight_decay_end changes"),
        ({}, 1, False, None),
    ],
)
def test_reasons(pictures, tmp_path, changes, world, scales, reason):
    run = SimpleNamespace(
        config=options(pictures, tmp_path, cuda_graph=True, **changes),
        world=SimpleNamespace(
            device=torch.device("cuda"), size=world, parallel=world > 1, strategy="ddp"
        ),
        scaler=SimpleNamespace(is_enabled=lambda: scales),
        optimizer=(torch.optim.SGD if changes.get("opt") == "sgd" else torch.optim.AdamW)(
            [torch.zeros(1)]
        ),
    )
    found = why_not(run)
    if reason is None:
        assert found is None
    else:
        assert re.search(reason, found)


# -- one step -------------------------------------------------------------------------------------


def graph_of(weight, capture=None):
    """Steps that learn `weight` from images, by AdamW."""
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)

    def compute(images, inputs):
        loss = (weight * images).sum() + inputs[0].sum()
        loss.backward()
        return loss.detach(), weight.grad.norm()

    return StepGraph(optimizer, compute, capture or Captures()), optimizer


def test_a_step_that_is_not_finite_changes_nothing():
    weight = torch.nn.Parameter(torch.ones(3))
    graph, optimizer = graph_of(weight)
    good, nothing = torch.ones(3), (torch.zeros(2),)
    for _ in range(WARM_UP + 2):
        graph(good, nothing)
    before = weight.detach().clone()
    state = {k: v.clone() for k, v in optimizer.state[weight].items()}
    for bad in (float("nan"), float("inf")):
        loss, norm = graph(torch.tensor([1.0, bad, 1.0]), nothing)
        assert not StepResult(loss, norm, 0.1, None).finite
        assert torch.equal(weight, before)
        assert all(torch.equal(v, optimizer.state[weight][k]) for k, v in state.items())
    assert graph(good, nothing) == (pytest.approx(float(before.sum())), pytest.approx(3**0.5))
    assert not torch.equal(weight, before)
    graph.close()
    assert not hasattr(optimizer, "found_inf") and optimizer.param_groups[0]["lr"] == 0.1
    assert not optimizer.param_groups[0]["capturable"]


def test_batches_and_rates_reach_the_captured_step():
    weight = torch.nn.Parameter(torch.zeros(3))
    graph, optimizer = graph_of(weight)
    for step in range(WARM_UP + 3):
        optimizer.param_groups[0]["lr"] = 0.0 if step % 2 else 0.1
        before = weight.detach().clone()
        images = torch.full((3,), 1.0 + step)
        loss, norm = graph(images, (torch.full((2,), float(step)),))
        assert norm == pytest.approx((1 + step) * 3**0.5)
        assert loss == pytest.approx(float((before * images).sum()) + 2 * step, abs=1e-5)
        assert torch.equal(weight, before) == bool(step % 2)


def test_other_shapes_and_ragged_masks_are_refused():
    graph, _ = graph_of(torch.nn.Parameter(torch.ones(3)))
    graph(torch.ones(3), (torch.zeros(2),))
    with pytest.raises(GraphError, match=r"tensors of \[\[3\], \[4\]\], .* had \[\[3\], \[2\]\]"):
        graph(torch.ones(3), (torch.zeros(4),))
    visible = torch.tensor(np.array([[[1, 0], [1, 1]], [[1, 0], [0, 0]]])).bool()
    with pytest.raises(GraphError, match="different numbers of visible blocks"):
        graph(torch.ones(3), (ck.BlockMask.from_visible(visible),))


def test_masks_of_equal_counts_are_inputs():
    weight, seen = torch.nn.Parameter(torch.ones(3)), []

    def compute(images, inputs):
        seen.append(inputs[0].visible.clone())
        loss = (weight * images).sum()
        loss.backward()
        return loss.detach(), weight.grad.norm()

    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    graph = StepGraph(optimizer, compute, Captures())
    masks = [ck.BlockMask.random(2, (4, 4), 0.5) for _ in range(WARM_UP + 2)]
    for mask in masks:
        graph(torch.ones(3), (mask,))
    assert all(torch.equal(found, mask.visible) for found, mask in zip(seen, masks, strict=True))


@pytest.mark.thorough
def test_weights_after_a_graph_are_an_ordinary_checkpoint(pictures, tmp_path, captures):
    config = options(pictures, tmp_path / "graph", epochs=2, amp="float32", cuda_graph=True)
    pretrain(config)
    pretrain(dataclasses.replace(config, epochs=3, resume="auto", cuda_graph=False))
    pretrain(dataclasses.replace(config, output_dir=str(tmp_path / "again")))
    again = dataclasses.replace(config, output_dir=str(tmp_path / "again"), epochs=3)
    pretrain(dataclasses.replace(again, resume="auto", cuda_graph=False))
    assert same(tensors(tmp_path / "graph"), tensors(tmp_path / "again"))
