"""Sweeps, fits, peers and the page of all of them. No test looks at how long anything takes."""

import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy
import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import checkouts, fits, full, page, parts, peers, report, runner, sweeps, work
from benchmarks.limits import using_threads
from tests.benchmarks.test_benchmarks import RATES, TINY, TINY_FLAGS
from tests.support.paths import ROOT

FLOAT = [torch.float32]


@pytest.fixture(autouse=True)
def quick_rates(monkeypatch):
    monkeypatch.setattr(command, "measure_rates", lambda device, dtypes: RATES)


def measured(case):
    """A comparison and its rows, of one round."""
    comparison = case.build(TINY, torch.float32)
    times = runner.measure(comparison, torch.float32, repeats=1, budget=0)
    rows = runner.make_rows(case.name, comparison, times, RATES, torch.float32, case.at)
    return comparison, {row.contender: row for row in rows}


# -- sweeps ---------------------------------------------------------------------------------------


def test_axes_cross_at_the_setting_and_one_value_changes_at_a_time():
    cases = sweeps.cases(TINY, [torch.float32, torch.bfloat16])
    assert len({case.name for case in cases}) == len(cases)
    centres = {case.at["op"]: case for case in cases if case.at["axis"] == "centre"}
    sizes = ("visible", "batch", "threads", "channels", "side")
    for case in cases:
        centre, axis = centres[case.at["op"]], case.at["axis"]
        changed = [key for key in sizes if case.at.get(key) != centre.at.get(key)]
        changed += ["dtype"] if case.dtypes != centre.dtypes else []
        assert changed == ([] if axis == "centre" else [axis])
    of_op = {case.at["axis"] for case in cases if case.at["op"] == "depthwise7x7/forward"}
    assert of_op == {"centre", "visible", "channels", "side", "batch", "dtype", "threads"}
    assert centres["gather"].at["visible"] == 0.25 and centres["gather"].dtypes == (torch.float32,)
    quick = sweeps.cases(TINY, [torch.float32, torch.bfloat16], quick=True)
    assert {case.name for case in quick} < {case.name for case in cases} | {"sweep/step/batch=2"}


@pytest.mark.parametrize(
    "name",
    [
        *("depthwise7x7/forward/side=2", "gather/visible=1.00", "scatter/channels=128"),
        *("grouped3x3/forward_backward/centre", "dense3x3/forward_backward/batch=1"),
        *("mask/random/batch=32", "mask/neighbours/centre"),
    ],
)
def test_a_point_is_measured_at_its_sizes(name):
    (case,) = (c for c in sweeps.cases(TINY, FLOAT) if c.name == f"sweep/{name}")
    _, rows = measured(case)
    assert list(rows) == ["packed", "dense"]
    assert rows["packed"].at == case.at
    if name.startswith(("gather", "scatter")):  # 16 blocks of 4 x 4 positions, read and written
        shown, every = (2 * 16 * share * 16 * case.at["channels"] * 4 for share in (0.25, 1))
        expected = {"gather": 2 * every, "scatter": shown + every}
        assert rows["packed"].bytes == expected[name.partition("/")[0]]


def test_the_step_shows_the_blocks_that_its_point_says(monkeypatch):
    kept = []
    for case in sweeps.cases(replace(TINY, img_size=224), FLOAT):
        if case.at["op"] == "stages12":
            monkeypatch.setattr(
                sweeps, "CASES", {"stages12": case.__class__("", "", lambda s, d: kept.append(s))}
            )
            case.build(TINY, torch.float32)
            assert kept[-1].block_mask().visible_per_image == round(196 * case.at["visible"])
    assert len(kept) == len(sweeps.STEP_SHARES[0])


def test_threads_are_those_of_the_point():
    before = torch.get_num_threads()
    with using_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_parts_of_a_step_make_up_the_step(monkeypatch):
    monkeypatch.setattr(parts, "ROUNDS", 2)
    cases = parts.cases(replace(TINY, batch_size=1), torch.float32)
    rows = [row for case in cases for row in measured(case)[1].values()]
    assert [(row.at["part"], row.at["phase"]) for row in rows[::2]] == parts.PARTS
    assert all(row.median > 0 for row in rows)


def test_a_stopwatch_sums_what_lies_between_two_entries(monkeypatch):
    seconds = iter([0.0, 1.0, 3.0, 6.0, 10.0])
    monkeypatch.setattr(parts.time, "perf_counter", lambda: next(seconds))
    watch = parts.Stopwatch(torch.device("cpu"))
    for part in ("a", "b", "a", "c"):
        watch.enter(part, "forward")
    found = watch.read()
    assert found == {("a", "forward"): 4e3, ("b", "forward"): 2e3, ("c", "forward"): 4e3}


# -- fits -----------------------------------------------------------------------------------------


def test_a_line_is_fitted_and_what_is_off_it_is_named():
    line = fits.fit([(0.25, 3.5), (1.0, 5.0), (0.5, 4.0)])
    assert (line.a, line.b, line.r2) == (pytest.approx(3), pytest.approx(2), pytest.approx(1))
    assert line.verdict == "a straight line"
    bent = fits.fit([(0.0, 2.0), (0.5, 2.0), (1.0, 5.0)])  # 1.5 + 3 share; 3 at the middle
    assert (bent.a, bent.b, bent.r2) == (pytest.approx(1.5), pytest.approx(3), pytest.approx(0.75))
    assert bent.largest == (0.5, pytest.approx(-0.5))
    assert bent.verdict == "not a straight line at 0%, 50% visible"
    with pytest.raises(ValueError, match="at least three different shares"):
        fits.fit([(0.5, 1.0), (0.5, 2.0), (1.0, 3.0)])


# -- the command ----------------------------------------------------------------------------------


def test_a_run_is_resumed_and_the_page_shows_it(tmp_path, capsys):
    path, output = tmp_path / "full.json", tmp_path / "page.html"
    flags = [
        *TINY_FLAGS,
        "--full",
        "--quick",
        "--dtype",
        "float32",
        "--repeats",
        "1",
        "--budget",
        "0",
    ]
    flags += ["--json", str(path), "--keep", "--case"]
    command.main([*flags, "sweep/gather/visible=0.5*", "sweep/gather/visible=1*"])
    first = report.load(path).rows
    command.main([*flags, "sweep/gather/[cv]*"])
    said = capsys.readouterr()
    assert "measuring sweep/gather/centre in float32" in said.err
    assert said.err.count("measuring sweep/gather/visible=0.50") == 1  # by the first run
    assert re.search(r"\ngather .* ms .* visible", said.out)
    rows = report.load(path).rows
    assert rows[: len(first)] == first and len(rows) > len(first)

    content = json.loads(path.read_text())
    with using_threads(content["environment"]["threads"] + 1), pytest.raises(SystemExit):
        command.main([*flags, "sweep/gather"])
    assert "is of a run with --threads" in capsys.readouterr().err
    content["notes"] = ["official ConvMAE: left out, <no> checkout"]
    path.write_text(json.dumps(content))
    page.main([str(path), str(ROOT / "benchmarks/results/cpu.json"), "-o", str(output)])
    text = output.read_text()
    assert not re.search(r"https?:|<script|<link|<img|@import|url\(", text)
    assert "official ConvMAE: left out, &lt;no&gt; checkout" in text
    drawn = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text)]
    titles = re.findall(r"<figure[^>]*><header><h3>(.*?)</h3>", text)
    assert len(drawn) == len(titles)
    assert {"gather (full)", "Roofline, float32 (cpu)", "Peak memory (cpu)"} <= set(titles)
    numbers = [v for svg in drawn for e in svg.iter() for v in e.attrib.values() if "nan" in v]
    assert not numbers
    every = rows + report.load(ROOT / "benchmarks/results/cpu.json").rows
    assert text.count("<tr") >= len(every)
    Balanced().feed(text)


class Balanced(HTMLParser):
    """Fails where an element is closed that was not the last one opened."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--quick"], "--quick is for --full"),
        (["--official", "there"], "--official is for --full"),
        (["--full", "--compare", "HEAD"], "--compare measures the cases"),
        (["--full", "--case", "gather/stage1"], "no case matches 'gather/stage1'"),
    ],
)
def test_flags_that_do_not_fit(flags, message, capsys):
    with pytest.raises(SystemExit):
        command.main([*TINY_FLAGS, *flags])
    assert message in capsys.readouterr().err


def test_notes_last_unless_their_case_is_measured_again():
    case = sweeps.cases(TINY, FLOAT)[0]
    ours = f"{case.name} in float32: left out, it failed"
    other = "sweep/other/centre in float32: left out, it failed"
    assert full.lasting([ours, other, "official SparK: left out, no checkout"], [case]) == [other]


# -- peers ----------------------------------------------------------------------------------------


def test_fastconvmae_in_its_own_way_computes_the_same_and_others_are_left_out():
    comparison = peers.fastconvmae_pass(replace(TINY, batch_size=1), torch.float32, None)
    times = runner.measure(comparison, torch.float32, repeats=1, budget=0)
    assert list(times) == ["packed", "dense"] and not comparison.failures
    (note,) = comparison.notes
    assert note.startswith("official FastConvMAE: left out, no checkout of its code was named")


@pytest.mark.parametrize("folder", ["nowhere", "."])
def test_a_folder_that_is_no_checkout(folder, tmp_path, monkeypatch):
    setting = replace(TINY, model="convmae_base", img_size=224)
    monkeypatch.setattr(peers.models, "build", lambda setting, kind: torch.nn.Linear(1, 1))
    comparison = peers.convmae_pass(setting, torch.float32, str(tmp_path / folder))
    assert "it is no checkout of that code" in comparison.notes[0]
    with pytest.raises(checkouts.CheckoutError, match="for 224 x 224 pixels only"):
        checkouts.convmae(str(tmp_path), TINY)


def test_published_files_leave_nothing_behind(tmp_path):
    pytest.importorskip("timm")
    (tmp_path / "util").mkdir()
    (tmp_path / "util" / "__init__.py").write_text("import numpy\nkind = numpy.float\n")
    (tmp_path / "first.py").write_text(
        "from timm.models.registry import register_model\nfrom util import kind\n"
        "@register_model\ndef resnet50(): return kind\n"
    )
    before, path = dict(sys.modules), list(sys.path)
    with checkouts.imported(tmp_path, "first") as (module,):
        assert module.resnet50() is float
    import timm

    assert timm.models.model_entrypoint("resnet50").__module__ == "timm.models.resnet"
    assert sys.path == path and not {"first", "util"} & set(sys.modules) - set(before)
    assert not hasattr(numpy, "float")


class WrongAtTimes:
    """A peer whose every `n`-th call is wrong."""

    def __init__(self, n):
        self.n, self.calls = n, 0

    def __call__(self):
        self.calls += 1
        return torch.ones(4) * (2 if self.calls % self.n == 0 else 1)


def test_a_peer_that_is_wrong_at_times_is_named_and_not_timed():
    checked = peers._checked(WrongAtTimes(7), lambda y: [y], torch.ones(4))
    comparison = runner.Comparison(
        [
            runner.Contender("dense", lambda: torch.ones(4), lambda y: [y]),
            runner.Contender("packed", lambda: torch.ones(4), lambda y: [y]),
            runner.Contender("spconv", checked, lambda y: [y]),
        ],
        work.Work(0),
        lambda run: (1.0, run()),
    )
    times = runner.measure(comparison, torch.float32, repeats=2, budget=0)
    assert list(times) == ["dense", "packed"]
    (failure,) = comparison.failures
    assert "spconv: DisagreementError: 2 of 20 calls" in failure
    assert full.is_of_a_peer(f"a case in float32: left out {failure}")
    assert not full.is_of_a_peer("a case in float32: left out packed: it failed")
