"""The numbers of the official SparK code, recorded in float32 and float64.

Recorded at commit a63e386 of keyu-tian/SparK, on weights, pictures and masks of `fill_spark.py`.
Float64 is the test of exactness. The limits in float32 are wide for a reason: kinks of ReLU and
BatchNorm over few values set the official float32 and float64 as far apart.
"""

import copy
import json

import numpy as np
import pytest
import torch
from golden import fill, fill_spark

from convmae import SparK
from convmae.models.cnn.light_decoder import TokenMap
from convmae_kernels import BlockMask
from tests.support.paths import GOLDEN

timm = pytest.importorskip("timm")

pytestmark = pytest.mark.thorough(but_every=3)  # a sample of long sweeps

DTYPES = {"f64": torch.float64, "f32": torch.float32}
LIMITS = {  # loss, features and pictures, gradient norms and buffers, losses of AdamW, of LAMB
    "f64": (1e-9, 1e-9, 1e-9, 1e-9, 1e-6),
    "f32": (1e-5, 1e-4, 3e-2, 5e-3, 2e-2),
}


class Case:
    """A golden file, in one of its dtypes."""

    def __init__(self, name, tag):
        self.file = np.load(GOLDEN / f"{name}.npz")
        self.meta = json.loads(str(self.file["meta"]))
        self.tag, self.dtype = tag, DTYPES[tag]

    def __getitem__(self, key):
        return self.file[f"{self.tag}/{key}"]

    def network(self):
        net = self.meta["net"]
        if isinstance(net, str):
            return timm.create_model(net, num_classes=0)
        return timm.models.ConvNeXt(depths=tuple(net[0]), dims=tuple(net[1]), num_classes=0)

    def model(self):
        meta = self.meta
        model = SparK(self.network(), img_size=meta["size"], decoder_width=meta["width"])
        unused = {f"{fill_spark.ENCODER}{name}" for name in model.unused_parameters}
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                if name not in unused:
                    official = fill_spark.official_name(name)
                    values = fill_spark.recipe(official, tuple(tensor.shape), meta["seed"])
                    tensor.copy_(torch.from_numpy(values))
        for name in unused:
            model.get_parameter(name).requires_grad_(False)
        return model.to(self.dtype)

    def inputs(self, seed):
        meta = self.meta
        images = torch.from_numpy(fill.images(meta["batch"], meta["size"], seed=seed))
        shown = fill_spark.visible(meta["batch"], meta["size"] // 32, meta["ratio"], seed)
        return images.to(self.dtype), BlockMask.from_visible(torch.from_numpy(shown))

    def optimizer_losses(self, kind):
        """Losses of three steps and of the pictures after them."""
        model = self.model().train()
        decayed = [], []
        for name, p in model.named_parameters():
            skipped = p.dim() == 1 or name in model.no_weight_decay()
            if p.requires_grad:
                decayed[skipped].append(p)
        groups = [{"params": p, "weight_decay": w} for p, w in zip(decayed, (0.04, 0.0))]
        lr = self.meta["lr"]
        if kind == "adamw":
            optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))
        else:
            from timm.optim import Lamb

            optimizer = Lamb(groups, lr=10 * lr, betas=(0.9, 0.95), max_grad_norm=5.0)
        losses = []
        for step in range(4):
            images, mask = self.inputs(self.meta["seed"] + 10 + step)
            loss = model(images, mask=mask).loss
            losses.append(loss.item())
            if step < 3:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return losses


def error(ours, golden, floor=0.0):
    """The largest difference, of the largest number."""
    golden = np.asarray(golden, np.float64)
    return float(np.abs(np.asarray(ours) - golden).max() / max(np.abs(golden).max(), floor))


@pytest.fixture(
    params=[
        ("spark_convnext", "f64"),
        ("spark_convnext", "f32"),
        ("spark_resnet26", "f64"),
        ("spark_resnet26", "f32"),
    ],
    ids="-".join,
)
def case(request):
    return Case(*request.param)


def grad_norms(model):
    return {
        fill_spark.official_name(name): p.grad.double().norm().item()
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def check_grad_norms(case, model, limit):
    golden = dict(zip(case.meta["names"], case["grad_norms"].tolist()))
    ours = grad_norms(model)
    assert ours.keys() == golden.keys()
    floor = 1e-3 * max(golden.values())
    wrong = {n: abs(ours[n] - value) / max(value, floor) for n, value in golden.items()}
    assert max(wrong.values()) < limit


def test_a_step(case):
    """Every number between picture and gradient, and the running statistics behind it."""
    loss_limit, map_limit, norm_limit, *_ = LIMITS[case.tag]
    strides = case.meta["strides"]
    images, mask = case.inputs(case.meta["seed"])
    assert (mask.visible.numpy() == case.file["visible"]).all()
    model = case.model()
    names = {fill_spark.official_name(name) for name in model.state_dict()}
    unused = {f"{fill_spark.ENCODER}{name}" for name in model.unused_parameters}
    assert names - unused == set(case.meta["shapes"]) - {"imn_m", "imn_s", "norm_black"}

    with torch.no_grad():
        loss = model.eval()(images, mask=mask).loss
    assert loss.item() == pytest.approx(float(case["loss_eval"]), rel=loss_limit)

    seen, painted = {}, []
    for level, projection in model.densify_projs.items():
        projection.register_forward_hook(
            lambda module, args, output, level=level: seen.update({level: output})
        )
    model.dense_decoder.register_forward_hook(lambda *a: painted.append(a[-1].detach()))
    maps = copy.deepcopy(model).train().forward_encoder(images, mask)
    for i, packed in enumerate(maps):
        down, across = strides[f"fea{i}"]
        rows = packed.dense().detach().permute(0, 2, 3, 1)
        rows = rows[mask.to_dense(packed.shape[3] // mask.grid[1])[:, 0]]
        assert error(rows[::down, ::across], case[f"fea{i}"]) < map_limit

    loss = model.train()(images, mask=mask).loss
    loss.backward()
    assert loss.item() == pytest.approx(float(case["loss"]), rel=loss_limit)
    for level, output in seen.items():
        down, across = strides[f"to_dec{level}"]
        output = output.dense() if isinstance(output, TokenMap) else output
        rows = output.detach().permute(0, 2, 3, 1).flatten(0, 2)[::down, ::across]
        assert error(rows, case[f"to_dec{level}"]) < map_limit
    assert error(painted[0][:, :, ::7, ::5], case["rec"]) < map_limit
    check_grad_norms(case, model, norm_limit)
    buffers = {fill_spark.official_name(name): b for name, b in model.named_buffers()}
    norms = [buffers[name].norm().item() for name in case.meta["buffers"]]
    if norms:
        np.testing.assert_allclose(norms, case["buffer_norms"], rtol=norm_limit)

    pasted = model.eval().reconstruct(images, mask=mask).pasted
    assert error(pasted[:, :, ::11, ::7], case["pasted_eval"]) < map_limit


@pytest.mark.parametrize(
    ("name", "tag", "kind"),
    [
        ("spark_convnext", "f64", "adamw"),
        ("spark_resnet26", "f64", "lamb"),  # clips
        ("spark_convnext", "f32", "adamw"),
    ],
)
def test_losses_of_training(name, tag, kind):
    case = Case(name, tag)
    limit = LIMITS[case.tag][3 if kind == "adamw" else 4]
    np.testing.assert_allclose(case.optimizer_losses(kind), case[f"{kind}_losses"], rtol=limit)


def test_the_official_width():
    case = Case("spark_resnet18", "f64")
    images, mask = case.inputs(case.meta["seed"])
    model = case.model().train()
    loss = model(images, mask=mask).loss
    loss.backward()
    assert loss.item() == pytest.approx(float(case["loss"]), rel=1e-9)
    check_grad_norms(case, model, 1e-9)
