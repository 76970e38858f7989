"""The examples run."""

import math

import pytest
import torch

from examples import masked_pretrain_cnn

timm = pytest.importorskip("timm")


@pytest.mark.parametrize("model", ["resnet18", "convnext_atto"])
def test_masked_pretraining_of_a_cnn(model, tmp_path, capsys):
    path = tmp_path / "encoder.pt"
    flags = ["--model", model, "--steps", "4", "--batch_size", "2", "--img_size", "64"]
    losses = masked_pretrain_cnn.main([*flags, "--output", str(path)])
    assert len(losses) == 4 and all(map(math.isfinite, losses))
    assert f"wrote {path}" in capsys.readouterr().out
    network = timm.create_model(model, num_classes=0)
    fresh = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    written = torch.load(path, weights_only=True)
    network.load_state_dict(written)
    assert any(not torch.equal(fresh[name], tensor) for name, tensor in written.items())


def test_wrong_size(capsys):
    with pytest.raises(SystemExit):
        masked_pretrain_cnn.main(["--img_size", "104"])
    assert "104 x 104 pixels" in capsys.readouterr().err
