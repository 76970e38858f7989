"""The loop that `docs/pretraining_cnns.md` shows runs as it stands."""

import re

import pytest
import torch

from tests.support.paths import ROOT

pytest.importorskip("timm")


def test_the_loop_runs(tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs" / "pretraining_cnns.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(program.splitlines()) < 30
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(program, names)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[:2]] == ["0", "1"]
    assert "missing_keys=['fc.weight', 'fc.bias'], unexpected_keys=[]" in printed[2]
    assert names["painted"].pasted.shape == (4, 3, 96, 96)
    assert torch.equal(names["classifier"].conv1.weight, names["network"].conv1.weight)
