"""What must be moved and computed is counted rightly."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import limits, models, work
from benchmarks.setting import Setting
from convmae_kernels import BlockMask

TINY = Setting(model="convmae_tiny", batch_size=2, img_size=64, compile=False)
RATES = limits.Rates(copy=1e9, gemm={torch.float32: 1e10, torch.bfloat16: 1e10})


def one_visible(batch_size: int = 2) -> BlockMask:
    visible = torch.zeros(batch_size, 2, 2, dtype=torch.bool)
    visible[:, 0, 1] = True
    return BlockMask.from_visible(visible)


def test_bytes_of_operators_by_hand():
    mask = one_visible()
    packed = 2 * 16 * 8 * 4  # 2 blocks, 4x4 positions, 8 channels, 4 bytes
    assert work.gather_work(mask, 4, 8, torch.float32) == work.Work(2 * packed)
    assert work.scatter_work(mask, 4, 8, torch.float32) == work.Work(packed + 4 * packed)
    forward = work.depthwise_work(mask, 4, 8, torch.float32, backward=False)
    both = work.depthwise_work(mask, 4, 8, torch.float32, backward=True)
    # In a row of 4 positions 4 + 2 * 3 + 2 * 2 = 14 pairs are at most 2 apart.
    assert forward == work.Work(2 * packed, 2 * 2 * 14**2 * 8)
    assert both == work.Work(5 * packed, 3 * forward.flops)
    assert work.gather_work(mask, 4, 8, torch.bfloat16).bytes == packed


@pytest.mark.parametrize("side", [1, 2, 4])
def test_visible_taps_one_by_one(side):
    mask = BlockMask.random(2, (3, 4), 0.6)
    dense = mask.to_dense(side)[:, 0].tolist()
    count = 0
    for image in dense:
        at = [(i, j) for i, row in enumerate(image) for j, seen in enumerate(row) if seen]
        count += sum(abs(a - c) <= 2 and abs(b - d) <= 2 for a, b in at for c, d in at)
    assert work.visible_taps(mask, side) == count


def test_limit_is_the_longer_of_moving_and_computing():
    assert work.Work(2 * 10**9).limit_seconds(RATES, torch.float32) == 2.0
    assert work.Work(10**9, 10**12).limit_seconds(RATES, torch.float32) == 1.0
    assert work.Work(10**9, 10**12, 10**11).limit_seconds(RATES, torch.float32) == 10.0


def base_macs(**options):
    shapes = {name: p.shape for name, p in models.parameters("convmae_base").items()}
    mask = BlockMask.random(1, (14, 14), 0.75, torch.Generator().manual_seed(0))
    return work.forward_macs(shapes, mask, **options)


def test_macs_of_the_official_dense_model():
    macs = base_macs(skip_hidden=False, loss_only=False)
    assert macs.total() == 17_218_220_544
    assert macs["blocks1"] + macs["blocks1.depthwise"] == 4_150_558_720
    assert macs["blocks2"] + macs["blocks2.depthwise"] == 2_327_162_880
    assert macs["blocks3"] == 3_855_548_928


def test_macs_of_visible_work():
    macs = base_macs(loss_only=False)
    useful1, useful2 = macs.pop("blocks1.depthwise"), macs.pop("blocks2.depthwise")
    every1, every2 = 2 * 784 * 25 * 256, 2 * 196 * 25 * 384  # hidden taps of visible positions too
    assert macs.total() + every1 + every2 == 11_203_874_304
    assert macs == {
        "patch_embed1": 9_633_792,
        "blocks1": 1_037_639_680 - every1,
        "stage1_output_decode": 154_140_672,
        "patch_embed2": 77_070_336,
        "blocks2": 581_790_720 - every2,
        "stage2_output_decode": 57_802_752,
        "patch_embed3": 57_802_752,
        "patch_embed4": 28_901_376,
        "blocks3": 3_855_548_928,
        "decoder_embed": 19_267_584,
        "decoder_blocks": 5_247_205_376,
        "decoder_pred": 77_070_336,
    }
    assert every1 // 2 < useful1 < every1 and every2 // 4 < useful2 < every2


def test_macs_of_tokens_that_are_the_same_in_all_images():
    shapes = {name: p.shape for name, p in models.parameters("convmae_base").items()}
    mask = BlockMask.random(8, (14, 14), 0.75, torch.Generator().manual_seed(0))
    every, needed = (work.forward_macs(shapes, mask, loss_only=flag) for flag in (False, True))
    one, alone = base_macs(loss_only=False), base_macs()
    last = 8 * (one["decoder_blocks"] - alone["decoder_blocks"])  # see below
    shared = (8 - 1) * 147 * 3 * 512**2 - 49 * 3 * 512**2
    assert every["decoder_blocks"] - needed["decoder_blocks"] == last + shared


def test_macs_that_the_loss_needs():
    every, needed = base_macs(loss_only=False), base_macs()
    visible, width = 49, 512  # of the last block: queries, projection, MLP and attention
    saved = visible * (1 + 1 + 8) * width**2 + 2 * visible * 196 * width
    assert every["decoder_blocks"] - needed["decoder_blocks"] == saved
    assert needed["decoder_pred"] == 57_802_752
    assert every.total() - needed.total() == saved + 77_070_336 - 57_802_752


def test_matmul_flops_are_those_that_the_model_executes():
    model = models.build(TINY, "packed")
    known = models.parameters(TINY.model)
    counted = work.training_work(known, TINY.block_mask(), 0, optimizer=True)
    with FlopCounterMode(display=False) as counter:  # bfloat16 attention is plain products
        with models.autocast(TINY, torch.bfloat16):
            loss = model(models.images(TINY), noise=TINY.noise()).loss
        loss.backward()
    width = known["mask_token"].shape[2]
    sums = 2 * TINY.block_mask().num_blocks * 4 * width  # of gradients of rows that tokens share
    executed = counter.get_flop_counts()["Global"]
    ours = {op for op in executed if str(op).startswith("convmae")}  # convolutions, not products
    assert ours and counted.matmul_flops + sums == sum(executed[op] for op in {*executed} - ours)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counted.bytes == 4 * 10 * trainable
