"""SparK and FCMAE on networks of all kinds: sizes, masks, losses, blocks, what is refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter

import convmae_kernels as ck
from convmae import FCMAE, SparK
from convmae.models.cnn.masked_cnn import finer_mask
from convmae.records.pictures import reconstruction_picture
from convmae_kernels import BlockMask

METHODS = (SparK, FCMAE)


class Stage(nn.Module):
    """A residual block behind a convolution with a stride."""

    def __init__(self, channels, width, stride):
        super().__init__()
        self.down = nn.Conv2d(channels, width, 3, stride, 1)
        self.norm = nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        x = F.relu(self.norm(self.down(x)))
        return x + self.conv(x)


class Network(nn.Module):
    """A network of one's own that returns the maps of some of its stages, each of stride 2."""

    def __init__(self, in_chans=3, stages=4, returned=(1, 2, 3), kind=list):
        super().__init__()
        widths = [in_chans, *(8 * (i + 1) for i in range(stages))]
        self.stages = nn.ModuleList(Stage(a, b, 2) for a, b in zip(widths, widths[1:]))
        self.dropout = nn.Dropout(0.5)
        self.returned, self.kind = returned, kind

    def forward(self, x):
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        maps = [maps[i] for i in self.returned]
        return {str(i): m for i, m in enumerate(maps)} if self.kind is dict else self.kind(maps)


def build(method, network=None, **options):
    torch.manual_seed(0)
    network = Network() if network is None else network
    given = {"img_size": (32, 48), "decoder_width": 32} | options
    return method(network, **given)


def mask_of(*rows):
    return BlockMask.from_visible(torch.tensor(rows, dtype=torch.bool))


MASK = mask_of([[1, 0, 0], [0, 1, 0]], [[0, 0, 1], [1, 0, 0]])


# -- the loss -------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_the_loss_is_that_of_hidden_blocks(method, norm_pix_loss):
    """An independent formula, with as many visible blocks in each image as one likes."""
    model = build(method, norm_pix_loss=norm_pix_loss).double().train()
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    mask = mask_of([[1, 0, 0], [0, 0, 0]], [[1, 0, 1], [1, 1, 0]])
    loss, removed, pred = model(images, mask=mask, return_pred=True)
    target = F.unfold(images, 16, stride=16).unflatten(1, (3, 256)).permute(0, 3, 2, 1).flatten(2)
    if norm_pix_loss:
        mean, var = target.mean(2, keepdim=True), target.var(2, keepdim=True)
        target = (target - mean) / (var + 1e-6).sqrt()
    error = (pred - target).square().mean(2)
    torch.testing.assert_close(loss, error[removed.bool()].mean())
    assert torch.equal(removed.bool(), ~mask.visible.flatten(1))
    torch.testing.assert_close(model(images, mask=mask).loss, loss)


@pytest.mark.parametrize("method", METHODS)
def test_hidden_pixels_are_targets_only(method):
    model = build(method).double()
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    hidden = ~MASK.to_dense(16)
    other = torch.where(hidden, torch.randn_like(images), images)
    first, second = (model(x, mask=MASK, return_pred=True) for x in (images, other))
    assert torch.equal(first.pred, second.pred) and first.loss != second.loss
    other = images.clone()
    other[0, :, :16, :16] += 1  # a visible block
    assert not torch.equal(model(other, mask=MASK, return_pred=True).pred, first.pred)


@pytest.mark.parametrize(("method", "kept"), [(SparK, 20), (FCMAE, 19)])
def test_how_many_blocks_stay_visible(method, kept):
    model = build(method, img_size=112)
    images, noise = torch.randn(2, 3, 112, 112), torch.rand(2, 49)
    mask = model.make_mask(images, noise=noise)  # 0.6 of 49
    assert mask.visible_per_image == kept
    assert mask.visible.flatten(1)[0].nonzero().flatten().tolist() == sorted(
        noise[0].argsort()[:kept].tolist()
    )
    assert model.make_mask(images, 0.75).visible_per_image == 12


def test_fcmae_predicts_what_its_parts_say():
    """Its decoder written out on the coarsest map."""
    model = build(FCMAE, decoder_depth=2).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    coarsest = model.forward_encoder(images, MASK)[0].dense()
    x = torch.einsum("nchw,dc->nhwd", coarsest, model.proj.weight[:, :, 0, 0]) + model.proj.bias
    x = torch.where(MASK.visible[..., None], x, model.mask_token.flatten())
    for block in model.decoder:
        y = F.conv2d(x.permute(0, 3, 1, 2), *block.dwconv.parameters(), padding=3, groups=32)
        y = F.layer_norm(y.permute(0, 2, 3, 1), (32,), *block.norm.parameters(), 1e-6)
        y = F.gelu(block.pwconv1(y))
        size = y.square().sum((1, 2), keepdim=True).sqrt()
        y = y + block.grn.beta + block.grn.gamma * y * size / (size.mean(3, keepdim=True) + 1e-6)
        x = x + block.pwconv2(y)
    expected = torch.einsum("nhwd,ed->nhwe", x, model.pred.weight[:, :, 0, 0]) + model.pred.bias
    pred = model(images, mask=MASK, return_pred=True).pred
    torch.testing.assert_close(pred, expected.flatten(1, 2))


def plain_pictures(model, images, mask):
    """What SparK paints, written out with PyTorch's dense modules; of a network of four scales."""
    maps = model.forward_encoder(images, mask)
    x = 0.0
    for level, block in enumerate(model.dense_decoder.dec):
        if str(level) in model.mask_tokens:
            key, packed = str(level), maps[-1 - level]
            visible = mask.to_dense(packed.shape[2] // mask.grid[0])
            normed = model.densify_norms[key](packed).dense()
            filled = torch.where(visible, normed, model.mask_tokens[key])
            projection = model.densify_projs[key]
            if not isinstance(projection, nn.Identity):
                padding = projection.kernel_size[0] // 2
                filled = F.conv2d(filled, projection.weight, projection.bias, padding=padding)
            x = x + filled
        x = block.conv(block.up_sample(x))
    return model.dense_decoder.proj(x)


@pytest.mark.parametrize("width", [32, 64])  # with an identity as projection, and without
def test_spark_paints_what_its_modules_say(width):
    model = build(SparK, decoder_width=width).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    mask = mask_of([[1, 0, 0], [0, 0, 0]], [[1, 0, 1], [1, 1, 0]])
    gradients = []
    for paint in (plain_pictures, lambda m, x, mask: m.forward_decoder(m.forward_encoder(x, mask))):
        model.zero_grad()
        painted = paint(model, images, mask)
        painted.square().mean().backward()
        gradients.append([painted.detach(), *(p.grad.clone() for p in model.parameters())])
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


# -- pictures, scales -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("channels", [1, 5])
def test_channels_and_rectangles(method, channels):
    model = build(method, Network(channels), in_chans=channels, img_size=[48, 16])
    images = torch.randn(3, channels, 48, 16)
    pictures = model.reconstruct(images, 0.5)
    assert pictures.reconstruction.shape == images.shape
    shown = model.unpatchify((1 - pictures.mask)[..., None].expand(-1, -1, 256 * channels)) > 0
    assert torch.equal(pictures.pasted[shown], images[shown])
    assert torch.equal(pictures.pasted[~shown], pictures.reconstruction[~shown])
    assert torch.equal(pictures.masked, images * shown)
    assert model.config["img_size"] == [48, 16] and model.config["in_chans"] == channels


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mask_size", [32, 48, 64])
def test_blocks_larger_than_the_stride(method, mask_size):
    """They are groups of smaller blocks: the same mask at both sizes paints the same picture."""
    size = (mask_size, 2 * mask_size)
    small, large = build(method, img_size=size), build(method, img_size=size, mask_size=mask_size)
    large.load_state_dict(small.state_dict())
    assert (small.patch_size, large.patch_size) == (16, mask_size) and large.grid == (1, 2)
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    coarse = mask_of([[1, 0]], [[0, 1]])
    fine = BlockMask.from_visible(coarse.to_dense(mask_size // 16)[:, 0])
    painted = [
        model.double().unpatchify(model(images, mask=mask, return_pred=True).pred)
        for model, mask in ((small, fine), (large, coarse))
    ]
    torch.testing.assert_close(*painted)


def test_a_finer_mask():
    for mask in (
        BlockMask.random(3, (2, 3), 0.5),
        mask_of([[1, 0, 1], [1, 1, 0]], [[0, 0, 1]] * 2),
    ):
        found, expected = finer_mask(mask, 3), BlockMask.from_visible(mask.to_dense(3)[:, 0])
        assert torch.equal(found.visible, expected.visible)
        assert torch.equal(found.block_index, expected.block_index)
        assert found.visible_per_image == expected.visible_per_image
        assert found.max_per_image == expected.max_per_image
    assert finer_mask(mask, 1) is mask


@pytest.mark.parametrize("kind", [list, tuple, dict])
def test_maps_of_ones_own_network(kind):
    model = build(SparK, Network(kind=kind))
    assert (model.maps.strides, model.maps.channels) == ((4, 8, 16), (16, 24, 32))
    assert len(model.dense_decoder.dec) == 4
    assert [*model.densify_projs] == ["0", "1", "2"]
    assert isinstance(model.densify_projs["0"], nn.Identity)  # 32 channels, as the decoder has
    assert model.densify_projs["1"].weight.shape == (16, 24, 3, 3)


def test_a_scale_may_be_missing_and_the_finest_has_stride_2():
    model = build(SparK, Network(returned=(0, 1, 3)))
    assert [*model.mask_tokens] == ["0", "2", "3"]
    model(torch.randn(2, 3, 32, 48), mask=MASK).loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert all(g is not None and g.abs().max() > 0 for n, g in grads.items() if "tokens" in n)
    coarser = build(SparK, Network(returned=(0, 1, 3)), min_stride=4)
    assert coarser.maps.strides == (4, 16)
    assert build(SparK, pooled(1, 2, 4), min_stride=1).maps.strides == (2, 4)


def test_fcmae_reads_the_coarsest_map_alone():
    model = build(FCMAE)
    assert (model.maps.strides, model.maps.channels) == ((16,), (32,))


@pytest.mark.parametrize(
    ("norms", "auto"),
    [(nn.BatchNorm2d, "bn"), (nn.LayerNorm, "ln"), (nn.Identity, "none")],
)
def test_densify_norm(norms, auto):
    network = Network()
    for stage in network.stages:
        stage.norm = nn.Identity()
    network.spare = norms(8)
    model = build(SparK, network)
    assert model.config["densify_norm"] == auto
    names = {n for n, _ in model.named_parameters() if n.startswith("densify_norms.1.")}
    assert names == (
        set() if auto == "none" else {"densify_norms.1.weight", "densify_norms.1.bias"}
    )
    assert set(model.unused_parameters) == {
        n for n, _ in network.named_parameters() if "spare" in n
    }
    assert model(torch.randn(2, 3, 32, 48), mask=MASK).loss.isfinite()


@pytest.mark.parametrize("method", METHODS)
def test_building_touches_nothing(method):
    """Neither buffers, nor modes, nor the random state of the network."""
    network = Network()
    network.stages[1].eval()
    before, modes = copy.deepcopy(network.state_dict()), [m.training for m in network.modules()]
    calls = []
    network.register_forward_hook(lambda module, args, output: calls.append(module.training))
    torch.manual_seed(1)
    with torch.device("meta"):  # nothing is drawn for the decoder either
        model = method(network, img_size=32, decoder_width=32)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1))
    assert calls and not any(calls) and model.network is network
    assert modes == [m.training for m in network.modules()]
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())


@torch.no_grad()
def test_initialisation():
    model = build(SparK, decoder_width=256)
    up = model.dense_decoder.dec[0].up_sample
    assert up.weight.std() == pytest.approx((2 / (256 * 16)) ** 0.5, rel=0.02)  # fan_out, ReLU
    assert up.bias.abs().max() == 0
    assert model.dense_decoder.dec[0].conv[0].weight.std() == pytest.approx(0.02, rel=0.02)
    tokens = torch.cat([token.flatten() for token in model.mask_tokens.values()])
    assert 0 < tokens.abs().max() <= 0.02
    model = build(FCMAE, decoder_width=256)
    assert model.pred.weight.std() == pytest.approx(0.02, rel=0.02)
    assert model.decoder[0].pwconv1.weight.std() == pytest.approx(0.02, rel=0.02)
    assert model.decoder[0].grn.gamma.abs().max() == 0 and model.pred.bias.abs().max() == 0


def test_no_weight_decay():
    network = Network()
    network.no_weight_decay = lambda: {"stages.0.conv.weight"}
    assert build(SparK, network).no_weight_decay() == {
        "sparse_encoder.sp_cnn.stages.0.conv.weight",
        *(f"mask_tokens.{i}" for i in range(3)),
    }
    assert build(FCMAE, network).no_weight_decay() == {"encoder.stages.0.conv.weight"}


@pytest.mark.parametrize("method", METHODS)
def test_autocast(method):
    model, images = build(method), torch.randn(2, 3, 32, 48)
    expected = model(images, mask=MASK, return_pred=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _, pred = model(images, mask=MASK, return_pred=True)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.loss.item(), 1e-2)
    assert (pred.float() - expected.pred).abs().max() < 0.05 * expected.pred.abs().max()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_norms_of_many_processes():
    """BatchNorm of network, densify and decoder becomes one that counts visible positions."""
    model = build(SparK)
    converted = ck.nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    kinds = [type(m) for m in converted.modules() if "BatchNorm" in type(m).__name__]
    assert len(kinds) == 4 + 3 + 8 and set(kinds) == {ck.nn.SyncBatchNorm}
    assert converted.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("method", METHODS)
def test_the_pictures_of_a_report(method):
    pytest.importorskip("PIL")
    model = build(method).train()
    before = copy.deepcopy(model.state_dict())
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    picture = reconstruction_picture(model, images, 0.5, seed=0)
    assert picture.size[0] > 4 * 48 and model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


# -- blocks ---------------------------------------------------------------------------------------


def step(model, images):
    model.zero_grad()
    loss = model(images, mask=MASK).loss
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    return loss.detach(), grads, {name: b.clone() for name, b in model.named_buffers()}


@pytest.mark.parametrize("method", METHODS)
def test_checkpointed_blocks_give_the_same_numbers(method):
    """Running statistics are updated once, too."""
    model, images = build(method).double(), torch.randn(2, 3, 32, 48, dtype=torch.float64)
    other = copy.deepcopy(model)
    other.set_grad_checkpointing()
    copied = copy.deepcopy(other)
    runs = []
    handle = other.network.stages[0].norm.register_forward_hook(lambda *_: runs.append(1))
    expected, found = step(model, images), step(other, images)
    assert len(runs) == 2  # once more for the gradients
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    other.set_grad_checkpointing(False)
    runs.clear()
    step(other, images)
    assert len(runs) == 1
    handle.remove()
    torch.testing.assert_close(step(copied, images), expected)  # a copy has its own blocks


@pytest.mark.thorough
@pytest.mark.parametrize(("method", "blocks"), [(SparK, 2 + 2), (FCMAE, 2 + 1)])
def test_compiled_blocks_give_the_same_numbers(method, blocks):
    network = Network(stages=2, returned=(0, 1))
    model = build(method, network, mask_size=16).double()
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    other = copy.deepcopy(model)
    counter = CompileCounter()
    torch.compiler.reset()
    other.compile_blocks(counter)
    other.set_grad_checkpointing(False)  # blocks stay compiled
    torch.testing.assert_close(step(other, images), step(model, images))
    assert counter.frame_count == blocks
    step(other, images)
    assert counter.frame_count == blocks


# -- what is refused ------------------------------------------------------------------------------


class Pyramid(nn.Module):
    """Maps made by a function of the picture."""

    def __init__(self, function):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.function = function

    def forward(self, x):
        return self.function(self.conv(x))


def pooled(*sizes):
    return Pyramid(lambda x: [F.max_pool2d(x, size) if size > 1 else x for size in sizes])


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        (pooled(4), {}, r"one scale only \(stride 4\).*FCMAE"),
        (pooled(8, 4), {}, r"finest first, got strides \[8, 4\]"),
        (pooled(4, 64), {"img_size": 64}, r"stride of 64, expected at most 32; leave its coarsest"),
        (pooled(4, 5), {"img_size": 40}, r"map of 8 x 8 of 40 x 40 pixels, expected .* squares"),
        (Pyramid(lambda x: x.mean((2, 3))), {}, r"gives \[1, 8\], expected maps"),
        (Pyramid(lambda x: [x.flatten(2)]), {}, r"gives \[1, 8, 1536\], expected maps"),
        (
            Pyramid(lambda x: x @ torch.ones(3, 3)),
            {},
            r"cannot take pictures of 3 channels and 32 x",
        ),
        (pooled(4, 8), {"in_chans": 4}, r"cannot take pictures of 4 channels"),
        (
            Pyramid(lambda x: [F.max_pool2d(x.flip(2), s) for s in (4, 8)]),
            {},
            r"Pyramid cannot run on visible blocks alone: flip in Pyramid.forward",
        ),
        (pooled(4, 8), {"img_size": 36}, r"map of 4 x 4 of 36 x 36"),
        (pooled(4, 8), {"mask_size": 4}, r"mask_size must be a multiple of the stride 8 .* got 4;"),
        (pooled(4, 8), {"mask_size": 12}, r"mask_size must be a multiple of the stride 8 .* 12"),
        (
            pooled(4, 8),
            {"img_size": (32, 40), "mask_size": 16},
            r"img_size 32 x 40 must be a multiple of mask_size = 16 .* for example 32 x 32",
        ),
        (pooled(4, 8), {"img_size": 0}, r"img_size must be a positive whole number"),
        (pooled(4, 8), {"mask_ratio": 1.0}, r"mask_ratio must be in \(0, 1\), got 1.0"),
        (pooled(4, 8), {"mask_rounding": "up"}, r"mask_rounding must be one of floor, round, got"),
        (pooled(4, 8), {"decoder_width": 12}, r"decoder_width must be a positive multiple .* 8"),
        (pooled(4, 8), {"densify_norm": "gn"}, r"densify_norm must be one of auto, bn, ln, none"),
    ],
)
def test_refused(network, options, message):
    with pytest.raises(ValueError, match=message):
        build(SparK, network, **options)


def test_an_encoder_is_a_module():
    with pytest.raises(TypeError, match="encoder must be a torch.nn.Module, got function"):
        SparK(lambda x: [x])


def test_masks_that_cannot_be_learned_from():
    model, images = build(SparK, img_size=32), torch.randn(1, 3, 32, 32)
    with pytest.raises(ValueError, match="hides none of the 4 blocks"):
        model(images, 0.0)
    with pytest.raises(ValueError, match="hides none of the 4 blocks"):
        model(images, mask=mask_of([[1, 1], [1, 1]]))
    with pytest.raises(ValueError, match="at least one visible block"):
        model(images, 0.9)
    one = mask_of([[1, 0], [0, 0]])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="a batch of one picture with one visible position"):
        model(images, mask=one)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.eval()(images, mask=one).loss.isfinite()
    with pytest.raises(ValueError, match="grid of 2 x 3 blocks"):
        model(images, mask=MASK)
