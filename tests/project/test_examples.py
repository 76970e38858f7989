"""The examples run."""

import math

import pytest
import torch

from examples import masked_pretrain_cnn

pytest.importorskip("timm")


@pytest.mark.parametrize("model", ["resnet18", "convnext_atto"])
def test_masked_pretraining_of_a_cnn(model, tmp_path, capsys):
    path = tmp_path / "encoder.pt"
    flags = ["--model", model, "--steps", "4", "--batch_size", "2", "--img_size", "64"]
    losses = masked_pretrain_cnn.main([*flags, "--output", str(path)])
    assert len(losses) == 4 and all(map(math.isfinite, losses))
    assert f"wrote {path}" in capsys.readouterr().out
    encoder = masked_pretrain_cnn.MaskedPretraining(model).encoder.model
    encoder.load_state_dict(torch.load(path, weights_only=True))


def test_the_loss_is_that_of_hidden_blocks():
    torch.manual_seed(0)
    model = masked_pretrain_cnn.MaskedPretraining("resnet18", width=16).eval()
    visible = torch.tensor([[[True, False], [False, False]]])
    mask = masked_pretrain_cnn.ck.BlockMask.from_visible(visible)
    images = torch.randn(1, 3, 64, 64)
    loss = model(images, mask)
    other = images.clone()
    other[..., 32:, 32:] = torch.randn(3, 32, 32)
    assert model(other, mask) != loss  # a target, so the loss changes
    brighter = images.clone()
    brighter[..., 32:, 32:] = 3 * images[..., 32:, 32:] + 1
    torch.testing.assert_close(model(brighter, mask), loss, rtol=1e-4, atol=0)


def test_a_flat_block_is_normalised_as_in_spark():
    """By the root of `variance + 1e-6`: not much amplified where a block hardly varies."""
    torch.manual_seed(0)
    model = masked_pretrain_cnn.MaskedPretraining("resnet18", width=16).eval()
    model.decoder.pixels.weight.data.zero_()
    model.decoder.pixels.bias.data.zero_()  # predicts 0: the loss is the mean square of the target
    visible = torch.tensor([[[True, False]]])
    mask = masked_pretrain_cnn.ck.BlockMask.from_visible(visible)
    images = 0.5 + 1e-3 * torch.randn(1, 3, 32, 64)
    block = images[..., 32:].double()
    expected = ((block - block.mean()).square() / (block.var() + 1e-6)).mean()
    assert 0.45 < expected < 0.55  # 1 without the 1e-6
    torch.testing.assert_close(model(images, mask).double(), expected, rtol=1e-4, atol=0)


def test_wrong_size(capsys):
    with pytest.raises(SystemExit):
        masked_pretrain_cnn.main(["--img_size", "100"])
    assert "--img_size must be a multiple of 32, got 100" in capsys.readouterr().err
