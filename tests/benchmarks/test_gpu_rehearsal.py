"""`make gpu` rehearsed without a GPU: what goes wrong is reported, and everything else is done.

A stand-in takes the GPU's place (`benchmarks/gpu/device.py`): the stages, their files and the
digest are those of a machine with a GPU, the sizes are tiny and the times mean nothing.
"""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from benchmarks.gpu import build, counters, digest, items, ncu_table, problems, store, timing
from benchmarks.gpu.device import STAND_IN, StandIn, find, slug
from tests.support.paths import ROOT

# What the stage `training` needs; without one of them it is left out.
TRAINS = all(importlib.util.find_spec(name) for name in ("tyro", "torchvision", "webdataset"))
FAULTS = {
    "checks/cpu:table/radius1/2/bfloat16": "raise",
    "checks/cpu:forward/side2/384/5x5/2/bfloat16": "disagree",
    "kernels/cpu:gather/side16/3/1/bfloat16": "crash",
    "kernels/cpu:scatter/side4/256/1/bfloat16": "hang",
    "kernels/cpu:windows/side4/256/halo1/1/bfloat16": "disagree",
    "graph": "hang",
    "compiled": "fail",
}
# Says what Nsight Compute says of a kernel, after running what it should look into.
NCU = """#!/bin/sh
case " $* " in
  *" --import "*) cat "$TABLE" ;;
  *) while [ "$1" != -m ]; do shift; done; exec "$PYTHON" "$@" ;;
esac
"""
COLUMNS = {
    "ID": ("", "0"),
    "Kernel Name": ("", "void convmae::cuda::masked_conv2d_tiles<bfloat16, 4, 5>(Params)"),
    "gpu__time_duration.sum": ("ns", "45,120"),
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": ("%", "52.5"),
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": ("%", "61"),
    "launch__occupancy_limit_registers": ("block", "9"),
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio": ("inst", "3.25"),
    "smsp__average_warps_issue_stalled_wait_per_issue_active.ratio": ("inst", "1"),
    "smsp__average_warps_issue_stalled_wait_not_issued_per_issue_active.ratio": ("inst", "7"),
    "smsp__average_warps_issue_stalled_selected_per_issue_active.ratio": ("inst", "8"),
}
LINES = (COLUMNS, *zip(*COLUMNS.values(), strict=True))
TABLE = "==PROF== Disconnected from process 7\n" + "".join(
    ",".join(f'"{cell}"' for cell in line) + "\n" for line in LINES
)


def gpu_sh(folder, *words, **environment):
    """Runs benchmarks/gpu.sh --stand-in; one thread, so that little else is disturbed."""
    return subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "--stand-in", *words],
        env=os.environ
        | {"OUT": str(folder), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
        | environment,
        capture_output=True,
        text=True,
        timeout=1500,
    )


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """All three calls, in which things go wrong as `FAULTS` says: the folder, and what was said."""
    tools, folder = tmp_path_factory.mktemp("tools"), tmp_path_factory.mktemp("rehearsal") / "gpu"
    (tools / "ncu").write_text(NCU)
    (tools / "ncu").chmod(0o755)
    (tools / "table.csv").write_text(TABLE)
    done = gpu_sh(
        folder,
        *("first", "test", "models"),
        PATH=f"{tools}:{os.environ['PATH']}",
        TABLE=str(tools / "table.csv"),
        CONVMAE_REHEARSAL_FAULTS=" ".join(f"{item}={kind}" for item, kind in FAULTS.items()),
    )
    return folder, done


@pytest.mark.thorough
def test_every_stage_is_run_whatever_happens_in_the_others(rehearsal):
    folder, done = rehearsal
    stages = {stage["name"]: stage for stage in store.load(folder / "run.json")["stages"]}
    outcomes = {name: stage["outcome"] for name, stage in stages.items()}
    bad = {"checks": "failed", "kernels": "failed", "graph": "hung", "compiled": "failed"}
    assert list(outcomes) == [
        *("env", "build", "checks", "kernels", "counters", "steps", "profile", "choices"),
        *("tests", "sanitizer", "training", "memory", "graph", "blocks", "compiled", "stages12"),
    ]
    assert outcomes == dict.fromkeys(outcomes, "ok") | bad, done.stdout + done.stderr
    assert stages["compiled"]["note"] == "failed on purpose"
    assert stages["graph"]["note"].startswith("stopped after its 3 s")
    assert done.returncode == 1  # of all, since some failed


@pytest.mark.thorough
def test_every_file_is_there_and_says_that_it_is_of_a_rehearsal(rehearsal):
    folder, _ = rehearsal
    parts = ["kernels.json", "counters.csv", "steps.json", "profile.json", "choices.json"]
    parts += ["tests.xml", *["training.xml"] * TRAINS]
    assert {file.name for file in folder.iterdir()} == {"log.txt", "digest.txt", "run.json"} | {
        f"{STAND_IN}-{part}" for part in parts
    }
    for file in folder.glob("*.json"):
        content = json.loads(file.read_text())
        assert content["environment"]["stand_in"] is True, file
        assert "gpu" not in content["environment"], file


@pytest.mark.thorough
def test_items_that_raise_crash_hang_or_disagree_are_left_out_alone(rehearsal):
    folder, _ = rehearsal
    found = store.load(folder / f"{STAND_IN}-kernels.json")
    failed = {
        item: result["failed"] for item, result in found["checks"].items() if "failed" in result
    }
    raised, wrong = "cpu:table/radius1/2/bfloat16", "cpu:forward/side2/384/5x5/2/bfloat16"
    assert set(failed) == {raised, wrong}
    assert failed[raised] == "RuntimeError: raised on purpose"
    assert "AssertionError: output errs by 1" in failed[wrong]
    assert len(found["checks"]) == len(problems.checked(StandIn()))

    results = found["kernels"]
    out = {item: result["failed"] for item, result in results.items() if "failed" in result}
    crashed, hung, disagreeing = (item for item in FAULTS if item.startswith("kernels/"))
    assert set(out) == {item.removeprefix("kernels/") for item in (crashed, hung, disagreeing)}
    assert out[crashed.removeprefix("kernels/")] == "its process ended with exit code -9"
    assert out[hung.removeprefix("kernels/")] == "no answer in 20 s: it hangs"
    assert "disagrees with the reference" in out[disagreeing.removeprefix("kernels/")]
    assert list(results) == timing.names(StandIn())
    rows = [row for result in results.values() for row in result.get("rows", []) if "us" in row]
    timed = {
        (row["kernel"], row["shape"], row["batch"], row["dtype"], row["implementation"])
        for row in rows
    }
    expected = {
        (p.kernel, p.shape, p.batch, p.dtype, implementation)
        for p in problems.timed(StandIn())
        for implementation in ("cpu", "pytorch")
        if f"cpu:{p.name}" not in out
    }
    # Of the one that disagrees PyTorch's time is there, to show what it should have beaten.
    assert timed == expected | {("windows", "side4/256/halo1", 1, "bfloat16", "pytorch")}
    assert all(row["us"] > 0 and row["bytes"] > 0 and row["sets"] >= 4 for row in rows)


@pytest.mark.thorough
def test_the_digest_ends_what_is_printed(rehearsal):
    folder, done = rehearsal
    page = (folder / "digest.txt").read_text()
    assert done.stdout.endswith(page) and len(page) <= digest.LIMIT
    assert page.startswith(digest.WARNING)
    for line in (
        "graph      hung",
        "  FAILED cpu:table/radius1/2/bfloat16: RuntimeError: raised on purpose",
        "  LEFT OUT cpu:scatter/side4/256/1/bfloat16: no answer in 20 s: it hangs",
        "masked_conv2d_tiles<bfloat16, 4, 5>(Params)",
        "  45.1   52.5    nan   61.0    nan  long_scoreboard 3.2, wait 1.0",
        "step, float32: packed",
        "memory, float32: dense",
        "stages12, float32: packed",
        "tests: 0 passed, 0 failed,",
        "training: 1 passed, 0 failed," if TRAINS else "left out: tyro, torchvision or webdataset",
        "a packed step by kernel: ",
    ):
        assert line in page, line


@pytest.mark.thorough
def test_the_profile_of_a_step_by_kernel(rehearsal):
    folder, _ = rehearsal
    found = store.load(folder / f"{STAND_IN}-profile.json")
    kinds = {row["kernel"]: row["kind"] for row in found["kernels"]}
    assert kinds["convmae::masked_conv2d"] == "ours" and kinds["aten::addmm"] == "GEMM"
    assert sum(row["share"] for row in found["kernels"]) == pytest.approx(1)
    assert found["launches"] > 100 and found["step_ms"] > 0


@pytest.mark.thorough
def test_without_a_gpu_it_says_so_at_once(tmp_path):
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "first"]
    environment = os.environ | {"OUT": str(tmp_path), "PYTHON": sys.executable}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "there is no GPU to measure on: torch" in done.stdout
    assert {file.name for file in tmp_path.iterdir()} == {"log.txt", "run.json", "digest.txt"}


def test_unknown_stages_and_no_time(tmp_path):
    done = gpu_sh(tmp_path, "frist")
    assert done.returncode == 2 and "there is no call or stage 'frist'" in done.stderr
    done = gpu_sh(tmp_path, "env", "build", CALL_SECONDS="0")
    assert done.returncode == 1 and "env: not run, no time was left" in done.stdout


# -- the parts ------------------------------------------------------------------------------------


def test_names_of_cards():
    assert slug("NVIDIA H200") == "h200"
    assert slug("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"


def test_no_gpu_is_not_taken_for_one(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(RuntimeError, match="sees no CUDA GPU"):
        find(stand_in=False)


def test_files_are_whole_and_keep_their_other_parts(tmp_path):
    file = tmp_path / "a.json"
    store.update(file, one=1)
    store.update(file, two=2)
    assert store.load(file) == {"one": 1, "two": 2}
    file.write_text("{")
    assert store.load(file) == {}
    store.main([str(file), "env", "ok", "3", "30", "a", "note"])
    store.main([str(file), "env", "hung", "30", "30"])
    stage = {"name": "env", "outcome": "hung", "seconds": 30, "limit": 30, "note": ""}
    assert store.load(file) == {"stages": [stage]}


def test_workers_that_cannot_start_end_the_stage():
    command = [sys.executable, "-c", "raise SystemExit(3)"]
    told = []
    supervisor = items.Supervisor(command, 60, told.append)
    supervisor.run()
    assert told == [supervisor]
    assert supervisor.results == {"all": {"failed": "its worker did not start; the log says why"}}


WORKER = """
import sys, time
from benchmarks.gpu import items

class Device:
    item_seconds = 30
    facts = staticmethod(dict)
    enter = staticmethod(lambda item: None)
    free = staticmethod(lambda: None)
    synchronize = staticmethod(lambda: 1 / (item != "breaks"))

def run(name):
    global item
    item = name
    if name == "takes long":
        time.sleep(60)
    return {"ok": True}

items.work(Device(), "stage", ["first", "breaks", "second", "takes long", "last"], run)
"""


@pytest.mark.thorough
def test_a_gpu_that_answers_no_more_and_what_is_not_reached():
    supervisor = items.Supervisor([sys.executable, "-c", WORKER], 6, lambda supervisor: None)
    supervisor.run()
    ok = {"ok": True}
    assert supervisor.results == {
        **{"first": ok, "breaks": ok, "second": ok},
        "takes long": {"failed": "the stage's time was over while it ran"},
        "last": {"failed": "not reached in the stage's 6 s"},
    }


def test_every_problem_has_an_opponent_that_computes_the_same():
    """PyTorch's way against the reference, in float64, on a ragged edge of every kind."""
    device = StandIn()
    for problem in problems.TIMED:
        problem = replace(problem, batch=2, dtype="float64")
        mask = problem.mask(device)
        given = problems.arguments(problem, device, mask, seed=1)
        opponent = problems.opponent(problem, mask)
        found = opponent.result(opponent.run(*opponent.prepare(given)))
        expected = problems.call(problem, "reference", given)
        assert items.largest_error(found, expected) < 1e-12, problem.name


def test_a_wrong_kernel_is_found_by_its_check(monkeypatch):
    from benchmarks.gpu import checks

    device, call = StandIn(), problems.call
    item = "cpu:weight_gradient/side4/256/5x5/2/bfloat16"

    def wrong(problem, implementation, given):
        found = call(problem, implementation, given)
        return [1.1 * t for t in found] if implementation == "cpu" else found

    monkeypatch.setattr(checks, "_poison", lambda: None)  # it lasts as long as the process
    assert checks.check(device, item)["ok"] is True
    monkeypatch.setattr(problems, "call", wrong)
    with pytest.raises(AssertionError, match=r"output errs by .* \(seed \d+\)"):
        checks.check(device, item)


def test_counters_of_several_tables_and_other_lines():
    (kernel,) = ncu_table.read(TABLE)
    assert kernel.figures == {"us": 45.12, "DRAM": 52.5, "SM": 61.0}
    assert kernel.stalls == {"long_scoreboard": 3.25, "wait": 1.0}
    assert len(ncu_table.read(TABLE + "==ERROR== The target failed\n" + TABLE)) == 2
    assert ncu_table.read("==ERROR== ERR_NVGPUCTRPERM, no permission") == []


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("echo ==ERROR== no permission; exit 1", "no counters: ==ERROR== no permission"),
        ("exit 3", "no counters: ncu ended with exit code 3"),
        ("sleep 60", "no counters: no end after 0 s"),
    ],
)
def test_counters_that_ncu_refuses(program, why, tmp_path, monkeypatch, capsys):
    (tmp_path / "ncu").write_text(f"#!/bin/sh\n{program}\n")
    (tmp_path / "ncu").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(counters.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as error:
        counters.main([str(tmp_path / "counters.csv"), "0.4"])
    assert error.value.code == why
    assert [file.name for file in tmp_path.iterdir()] == ["ncu"]
    capsys.readouterr()


def test_a_digest_of_anything_fits_its_limit(tmp_path):
    rows = [
        {
            **{"kernel": "forward", "shape": f"side{i}", "batch": 128, "dtype": "bfloat16"},
            **{"implementation": "cuda", "us": 1.0, "rate": 1e12, "of_copy": 0.5},
            **{"copy_rate": 3e12, "in_cache": False},
        }
        for i in range(300)
    ]
    store.update(tmp_path / "run.json", environment={"slug": "x", "device": "X"})
    store.update(tmp_path / "x-kernels.json", kernels={"all": {"rows": rows}})
    page = digest.digest(tmp_path)
    assert len(page) <= digest.LIMIT and page.endswith("cut; the files have the rest\n")
    store.update(tmp_path / "x-kernels.json", kernels={"all": {"rows": [{"batch": 1}]}})
    assert "*** a part of this page failed: KeyError" in digest.digest(tmp_path)


def test_a_digest_of_both_reports_of_pytest(tmp_path):
    report = "<testsuites><testsuite>{}</testsuite></testsuites>"
    bad = '<testcase name="test_b"><failure message="no\n such"/></testcase>'
    good, skipped = '<testcase name="test_a"/>', "<testcase><skipped/></testcase>"
    (tmp_path / "tests.xml").write_text(report.format(good + skipped))
    (tmp_path / "training.xml").write_text(report.format(good + bad))
    assert digest.digest(tmp_path).endswith(
        "tests: 1 passed, 0 failed, 1 skipped\n"
        "training: 1 passed, 1 failed, 0 skipped\n"
        "  FAILED test_b: no such\n"
    )


def test_tests_that_were_stopped_are_read_from_the_log(tmp_path):
    (tmp_path / "log.txt").write_text(
        "== tests, at most 5 s: pytest\n"
        "[gw0] [ 10%] PASSED tests/gpu/test_gpu.py::test_a[x y] \n"
        "tests/gpu/test_gpu.py::test_b FAILED   [ 20%]\n"
        "[gw1] [ 30%] SKIPPED tests/gpu/test_gpu.py::test_c \n"
        "== sanitizer, at most 5 s: pytest\n"
        "tests/gpu/test_gpu_sanitizer.py::test_d PASSED   [ 50%]\n"
        "== training, at most 5 s: pytest\n"
        "[gw0] [ 10%] PASSED tests/convmae/test_cli.py::test_e \n"
    )
    page = digest.digest(tmp_path)
    assert "tests, stopped: 1 passed, 1 failed, 3 of them ended" in page
    assert "training, stopped: 1 passed, 0 failed, 1 of them ended" in page
    assert "  FAILED tests/gpu/test_gpu.py::test_b\n" in page


def test_an_nvcc_that_is_too_old_leaves_triton(tmp_path, monkeypatch, capsys):
    """The build fails before anything is compiled, and the stage says what runs instead."""
    from tests.convmae_kernels.csrc.test_cuda_build import write_nvcc

    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(write_nvcc(tmp_path, "11.8", (80, 86, 90))))
    monkeypatch.setattr(build, "why_not_cuda", lambda: "there is no library")
    with pytest.raises(SystemExit) as error:
        build.main(["10.0"])
    said = str(error.value.code)
    assert said.startswith(
        "goes on with Triton's kernels: error: TORCH_CUDA_ARCH_LIST asks for 10.0"
    )
    assert 'TORCH_CUDA_ARCH_LIST="9.0+PTX"' in said
    capsys.readouterr()
