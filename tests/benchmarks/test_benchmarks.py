"""The benchmarks compare and report rightly. No test looks at how long anything takes."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import __main__ as command
from benchmarks import cases, limits, models, registry, report, runner, work
from benchmarks.setting import Setting

pytestmark = pytest.mark.thorough(but_every=3)  # a sample of long sweeps

TINY = Setting(model="convmae_tiny", batch_size=2, img_size=64, compile=False)
RATES = limits.Rates(copy=1e9, gemm={torch.float32: 1e10, torch.bfloat16: 1e10})


# -- the runner -----------------------------------------------------------------------------------


class Scripted:
    """A contender whose measures are given, and that writes down when it runs."""

    def __init__(self, name, measures, log, value=1.0):
        self.name, self.measures, self.log, self.value = name, list(measures), log, value

    def run(self):
        self.log.append(self.name)
        return self.measures.pop(0)

    def contender(self):
        return runner.Contender(self.name, self.run, lambda _: [torch.tensor([self.value])])


def scripted(packed, dense, value=1.0, **options):
    log = []
    contenders = [
        Scripted("packed", packed, log, value).contender(),
        Scripted("dense", dense, log).contender(),
    ]

    def clock(run):
        measured = run()
        return measured, measured

    return runner.Comparison(contenders, work.Work(10**6, 7), clock, **options), log


def test_rounds_are_interleaved_and_the_first_is_not_counted():
    comparison, log = scripted([99, 1, 2, 3, 4], [99, 10, 30, 20, 40])
    times = runner.measure(comparison, torch.float32, repeats=4, budget=1e9)
    assert log == ["packed", "dense"] * 5
    assert times == {"packed": [1, 2, 3, 4], "dense": [10, 30, 20, 40]}
    packed, dense = runner.make_rows("a/case", comparison, times, RATES, torch.float32)
    assert (packed.median, dense.median) == (2.5, 25)
    assert (packed.ratio, dense.ratio) == (10, 1)
    assert packed.round_ratio == 10 and packed.rounds == 4  # of 10, 15, 20 / 3 and 10
    assert packed.spread == 1.5 / 2.5  # quartiles 1.75 and 3.25
    assert packed.limit == 1.0  # ms: 1 MB at 1 GB/s
    assert packed.fraction == 1.0 / 2.5
    assert (packed.case, packed.dtype, packed.bytes, packed.flops) == (
        "a/case",
        "float32",
        10**6,
        7,
    )


def test_budget_ends_the_rounds_but_not_before_three(monkeypatch):
    seconds = iter(range(100))
    monkeypatch.setattr(runner.time, "perf_counter", lambda: next(seconds))
    for budget, rounds in ((0, 3), (3.5, 6)):  # the clock is read from the fourth round on
        comparison, _ = scripted([1] * 50, [1] * 50)
        times = runner.measure(comparison, torch.float32, repeats=40, budget=budget)
        assert len(times["dense"]) == rounds


def test_one_round_without_warm_up():
    comparison, _ = scripted([5], [6], unit="MiB", max_rounds=1, warm_up=False)
    times = runner.measure(comparison, torch.float32, repeats=9, budget=0)
    assert times == {"packed": [5], "dense": [6]}
    row = runner.make_rows("memory", comparison, times, RATES, torch.float32)[0]
    assert (row.spread, row.rounds, row.limit) == (0.0, 1, 10**6 / 2**20)


@pytest.mark.parametrize("value", [1.001, math.nan])
def test_different_work_is_not_compared(value):
    comparison, _ = scripted([1] * 9, [1] * 9, value=value)
    with pytest.raises(runner.DisagreementError, match="'packed' has a relative error of"):
        runner.measure(comparison, torch.float32, repeats=1, budget=0)


def test_other_shapes_are_not_compared():
    one, two = [torch.zeros(1)], [torch.zeros(2)]
    with pytest.raises(runner.DisagreementError, match=r"is \[2\], of 'dense' \[1\]"):
        runner.check_agreement({"packed": two, "dense": one}, 1.0)
    with pytest.raises(runner.DisagreementError, match="gives 2 tensors, 'dense' 1"):
        runner.check_agreement({"packed": one * 2, "dense": one}, 1.0)


# -- every case -----------------------------------------------------------------------------------

LIKE_ANOTHER = (  # and takes long
    "strided/forward",
    "network/convnext_tiny/memory",
    "pretrain/spark/resnet50/memory",
    "pretrain/spark/convnext_base/memory",
    "pretrain/spark/convnext_base",
    "pretrain/fcmae/resnet50/memory",
    "pretrain/fcmae/convnextv2_tiny/memory",
    *("decoder/resnet50/densify2", "decoder/resnet50/densify3"),
    *(f"decoder/convnext_tiny/{part}" for part in ("first", "densify1", "densify2", "densify3")),
    *("decoder/merged/384", "decoder/merged/192", "decoder/merged/96"),
)
COUNTED = ("budget/launches", "budget/bytes", "budget/flops")  # in tests/benchmarks/test_budget.py
# Networks with the layers of the larger ones, whose names the cases have.
SMALLER = {"resnet50": "test_resnet", "convnext_tiny": "convnext_atto"}
SMALLER |= {"convnextv2_tiny": "convnextv2_atto"}
BASELINES = {"mae": "MAE ViT-B", "joined": "apart"}
IN_BFLOAT16 = ("gather/images", "depthwise/stage1/forward_backward", "stages12", "step")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(
            *(name, torch.float32),
            marks=[pytest.mark.thorough] if name.endswith("/memory") else [],
        )
        for name in registry.CASES
        if name not in LIKE_ANOTHER + COUNTED
    ]
    + [(name, torch.bfloat16) for name in IN_BFLOAT16],
)
@pytest.mark.thorough(but_every=3)
def test_case_compares_the_same_work(name, dtype, monkeypatch):
    """`measure` itself checks that packed and dense results agree."""
    if name.startswith(("network/", "pretrain/")) and not name.endswith("/memory"):
        timm = pytest.importorskip("timm")
        create = timm.create_model
        monkeypatch.setattr(timm, "create_model", lambda n, **kw: create(SMALLER[n], **kw))
    comparison = registry.CASES[name].build(TINY, dtype)
    times = runner.measure(comparison, dtype, repeats=1, budget=0)
    rows = runner.make_rows(name, comparison, times, RATES, dtype)
    assert [row.contender for row in rows] == [
        "joined" if name == "joined" else "packed",
        BASELINES.get(name, "dense"),
    ]
    assert rows[1].ratio == 1
    for row in rows:
        numbers = [v for v in vars(row).values() if isinstance(v, int | float)]
        assert all(math.isfinite(v) for v in numbers)
        assert row.median > 0 and row.ratio > 0 and row.limit > 0 and row.bytes > 0


def test_mae_is_the_published_one():
    model = models.MAE(224)
    trainable = sum(p.numel() for p in model.parameters())
    assert trainable == 111_655_680  # of ViT-B and the decoder, without positional embeddings
    noise = Setting(img_size=224, batch_size=1).noise()
    images = models.images(Setting(img_size=224, batch_size=1))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        loss, mask, _ = model(images, mask_ratio=0.75, noise=noise)
    assert mask.shape == (1, 196) and mask.sum() == 147
    assert loss.isfinite() and loss > 0
    counted = counter.get_flop_counts()["Global"]
    encoder, decoder = 12 * 12 * 768**2 * 50, 8 * 12 * 512**2 * 197
    outside = 196 * 768 * 768 + 50 * 768 * 512 + 197 * 512 * 768
    layers = (torch.ops.aten.convolution, torch.ops.aten.addmm)  # all but attention
    assert sum(counted[layer] for layer in layers) == 2 * (encoder + decoder + outside)


@pytest.mark.thorough
@pytest.mark.skipif(
    cases.why_no_compile(torch.device("cpu")) is not None, reason="no C++ compiler for compile"
)
def test_compiled_opponent():
    setting = replace(TINY, compile=True)
    comparison = registry.CASES["depthwise/stage2/forward"].build(setting, torch.float32)
    times = runner.measure(comparison, torch.float32, repeats=1, budget=0)
    assert list(times) == ["packed", "dense", "dense compiled"]


def test_no_compiler_is_said(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    comparison = registry.CASES["scatter/stage2"].build(replace(TINY, compile=True), torch.float32)
    assert [c.name for c in comparison.contenders] == ["packed", "dense"]
    assert "needs a C++ compiler" in comparison.notes[0]


def test_cases_are_chosen_by_name_part_or_glob():
    def names(*patterns):
        return [case.name for case in registry.select(patterns)]

    assert names("step") == ["step"]
    assert names("gather") == ["gather/images", "gather/stage1", "gather/stage2"]
    assert names("*/stage1/*", "step") == [
        "depthwise/stage1/forward",
        "depthwise/stage1/forward_backward",
        "step",
    ]
    assert names() == list(registry.CASES)
    with pytest.raises(ValueError, match="no case matches 'stepp'; there are budget/bytes, "):
        registry.select(["stepp"])


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="two cases of the name 'step'"):
        registry.register("step")(lambda setting, dtype: None)


# -- limits and environment -----------------------------------------------------------------------


def test_rates_and_environment():
    device = torch.device("cpu")
    assert limits.copy_bandwidth(device, 4096) > 0
    assert limits.gemm_rate(device, torch.bfloat16, [(4, 4, 4), (8, 4, 2)]) > 0
    facts = limits.environment(device)
    assert facts["torch"] == torch.__version__ and facts["threads"] == torch.get_num_threads()
    assert facts["cpu"] and facts["cores"] >= 1 and facts["date"].endswith("UTC")
    json.dumps(facts)


# -- the command ----------------------------------------------------------------------------------


@pytest.fixture
def quick_rates(monkeypatch):
    monkeypatch.setattr(command, "measure_rates", lambda device, dtypes: RATES)


TINY_FLAGS = ["--model", "convmae_tiny", "--img_size", "64", "--batch-size", "2", "--no-compile"]


def test_command_json_summary_and_markdown(quick_rates, tmp_path, capsys):
    path = tmp_path / "results.json"
    flags = ["--case", "step", "gather/stage2", "--dtype", "float32", "--repeats", "1"]
    command.main([*TINY_FLAGS, *flags, "--summary", "--json", str(path)])
    printed = capsys.readouterr().out
    assert "one training step of convmae_tiny on 2 images of 64 x 64 pixels, 75% hidden" in printed
    assert "note: compiled models: left out, ask for them with --compile-models" in printed

    results = report.load(path)
    assert [(row.case, row.contender) for row in results.rows] == [
        (case, contender) for case in ("gather/stage2", "step") for contender in ("packed", "dense")
    ]
    assert report.table(results) in printed
    again = tmp_path / "again.json"
    report.save(results, again)
    assert report.load(again) == results

    report.main([str(path)])
    printed = capsys.readouterr().out
    assert printed.startswith(f"<!-- Written by `python -m benchmarks.report {path}`;")
    lines = printed[printed.index("| case") :].splitlines()
    assert lines[0].startswith("| case | dtype | packed |")
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| gather/stage2", "| step"]
    assert all(line.count("|") == lines[0].count("|") for line in lines[:4])


def contender(name, median, ratio):
    base = results_of(100.0, 200.0).rows[0]
    return replace(base, contender=name, median=median, ratio=ratio)


def test_a_contender_stands_beside_the_dense_one_of_its_own_run():
    """Rows of several runs in one file: the dense one in it is the last that was measured."""
    rows = [contender("packed", 60.0, 1.2), contender("packed graph", 36.0, 2.0)]
    rows += [contender("dense", 70.0, 1.0), contender("dense compiled", 50.0, 1.4)]
    environment = {"threads": 1, "cpu": "c", "cores": 1, "capability": "", "torch": "t"}
    environment |= {"kernels": "yes", "date": "today"}
    text = report.markdown(replace(results_of(1.0, 1.0), rows=rows, environment=environment))
    assert "| step | float32 | 60 ms | 72 | 50 | **1.20x** | " in text
    assert "| step | float32 | packed graph | 36 ms | 0.0% | 72 | **2.00x** | " in text
    assert "packed compiled" not in text and text.count("| step |") == 2


def test_what_a_cpu_emulates_is_left_out(quick_rates, monkeypatch, capsys):
    monkeypatch.setattr(command, "SLOW_ON_CPU", frozenset([torch.bfloat16]))
    flags = ["--case", "drop_in/quarter", "mask", "--dtype", "bfloat16", "--repeats", "1"]
    command.main([*TINY_FLAGS, *flags])
    printed = capsys.readouterr().out
    assert "note: networks and layers in bfloat16: left out, the CPU emulates it" in printed
    assert "\nmask " in printed and "\ndrop_in" not in printed


def results_of(packed, dense):
    comparison, _ = scripted([], [])
    times = {"packed": [packed], "dense": [dense]}
    rows = runner.make_rows("step", comparison, times, RATES, torch.float32)
    setting = {"model": "m", "batch_size": 8, "img_size": 64, "mask_ratio": 0.75, "device": "cpu"}
    return report.Results({"threads": 1}, setting, 1e9, {"float32": 1e10}, rows)


@pytest.mark.thorough
def test_rows_of_other_cases_are_kept(quick_rates, tmp_path, capsys):
    path = tmp_path / "results.json"
    flags = [*TINY_FLAGS, "--dtype", "float32", "--repeats", "1", "--keep"]
    command.main([*flags, "--case", "gather/stage1", "gather/stage2", "--json", str(path)])
    old = report.load(path).rows
    command.main([*flags, "--case", "gather/stage2", "scatter/stage2", "--json", str(path)])
    new = report.load(path).rows
    assert new[:2] == [row for row in old if row.case == "gather/stage1"]
    assert [row.case for row in new[2:]] == ["gather/stage2"] * 2 + ["scatter/stage2"] * 2
    assert new[2:4] != old[2:]  # measured again

    before = path.read_bytes()
    for wrong, message in (
        ([], "--keep needs --json"),
        (["--batch_size", "3", "--json", str(path)], "results of another setting or device"),
    ):
        with pytest.raises(SystemExit):
            command.main([*flags, "--case", "gather/stage2", *wrong])
        assert message in capsys.readouterr().err
    assert path.read_bytes() == before


def test_a_run_that_stops_keeps_what_it_measured(quick_rates, tmp_path, monkeypatch):
    def stop(setting, dtype):
        raise KeyboardInterrupt

    broken = replace(registry.CASES["scatter/stage2"], build=stop)
    monkeypatch.setitem(registry.CASES, "scatter/stage2", broken)
    path = tmp_path / "results.json"
    flags = ["--case", "gather/stage2", "scatter/stage2", "--dtype", "float32", "--no-compile"]
    with pytest.raises(KeyboardInterrupt):
        command.main([*TINY_FLAGS, *flags, "--json", str(path)])
    assert {row.case for row in report.load(path).rows} == {"gather/stage2"}
    assert list(tmp_path.iterdir()) == [path]


def test_summary_says_which_way_it_went():
    faster = report.summary(results_of(100.0, 200.0))
    assert "(1 thread)" in faster and "2.00 times as fast, 50% of the time saved" in faster
    assert "takes 200 ms (40.0 images/s)" in faster and "100 ms (80.0 images/s)" in faster
    assert "0.50 times as fast: skipping does not pay" in report.summary(results_of(200.0, 100.0))
    with pytest.raises(ValueError, match="needs the case 'step'"):
        report.summary(replace(results_of(1.0, 1.0), rows=[]))


@pytest.mark.parametrize(
    ("flags", "dtypes"),
    [
        ([], [torch.float32, torch.bfloat16]),
        (["--summary"], [torch.float32]),
        (["--summary", "--dtype", "bfloat16"], [torch.bfloat16]),
    ],
)
def test_dtypes_that_are_measured(flags, dtypes, monkeypatch):
    asked = []

    def run(chosen, setting, dtypes, **options):
        asked.extend(dtypes)
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run", run)
    with pytest.raises(KeyboardInterrupt):
        command.main([*TINY_FLAGS, *flags])
    assert asked == dtypes


def test_list_prints_every_case(capsys):
    command.main(["--list"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(
        registry.CASES
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--case", "conv"], "no case matches 'conv'"),
        (["--model", "convmae_tyni"], "no model 'convmae_tyni'"),
        (["--model", "convvit_tiny"], "needs a model to pretrain: convmae_base"),
        (["--img_size", "100"], "img_size must be a multiple of 16, got 100"),
        (["--mask_ratio", "0"], "mask_ratio must leave some"),
        (["--batch_size", "0"], "batch_size must be at least 1, got 0"),
        (["--repeats", "0"], "repeats must be at least 1, got 0"),
        (["--threads", "0"], "threads must be at least 1, got 0"),
        (["--budget", "-1"], "budget must not be negative, got -1"),
        (["--case", "gather", "--summary"], "--summary needs the case 'step'"),
        (["--dtype", "float16"], "invalid choice: 'float16'"),
        (["--json", "no/such/folder.json"], "json must be a file in a folder that exists, got no/"),
    ],
)
def test_bad_choices_are_named(flags, message, capsys):
    with pytest.raises(SystemExit) as error:
        command.main(flags)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["not JSON", "[]", '{"format": 0}', '{"format": 1, "rows": []}'])
def test_files_that_hold_no_results(text, tmp_path, capsys):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="results.json"):
        report.load(path)
    with pytest.raises(SystemExit):
        report.main([str(path)])
    assert "results.json" in capsys.readouterr().err
