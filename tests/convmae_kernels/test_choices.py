"""Tables of measured choices: what they change; a wrong one changes nothing, and says so."""

import json
import warnings

import pytest
import torch

import convmae_kernels as ck
from convmae_kernels import measure
from convmae_kernels.ops.support import choices
from convmae_kernels.ops.support.choices import Choice, Sizes, Table
from convmae_kernels.ops.support.dispatch import WHY_NOT_COMPILED

needs_library = pytest.mark.skipif(WHY_NOT_COMPILED is not None, reason="no compiled library")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_table_afterwards():
    yield
    ck.use_table(None)


@pytest.fixture
def mask():
    return ck.BlockMask.random(2, (4, 4), 0.5, torch.Generator().manual_seed(0))


def choice(**changes):
    values = {"op": "masked_conv2d", "dtype": "float32", "side": 4, "kernel": (3, 3), "least": 5}
    values |= {"most": 8, "wide": True, "choice": "reference", "default": "cpu"}
    return Choice(**{**values, "microseconds": {}, "group_channels": 1, **changes})


def write(path, implementations=(), kernels=(), **facts):
    facts = {**choices.facts_of(CPU), **facts}
    choices.write(path, Table("", facts, tuple(implementations), tuple(kernels)))
    return path


def ran(mask, channels=8, **options):
    """The names of the registered ops that a convolution runs, and its result."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(mask.num_visible, 16, channels, generator=generator)
    weight = torch.randn(channels, 1, 3, 3, generator=generator)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        y = ck.masked_conv2d(x, weight, None, mask, groups=channels, **options)
    return {e.name for e in profiler.events() if e.name.startswith("convmae")}, y


def test_a_table_chooses_among_implementations(tmp_path, mask):
    expected = ran(mask)[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ck.use_table(write(tmp_path / "t.json", [choice()]))
    names, y = ran(mask)
    assert not names  # the reference is made of PyTorch's ops
    torch.testing.assert_close(y, expected)
    for other in ({"channels": 4}, {"channels": 12}, {"dilation": 2}):  # it does not cover these
        assert ran(mask, **other)[0] == {"convmae::masked_conv2d"}
    found = ck.explain("masked_conv2d", side=4, channels=8, groups=8, kernel=3, batch=1)
    assert {s.implementation for s in found.steps} == {"pytorch"}
    assert found.notes == (f"the measured table {tmp_path / 't.json'} is in use",)
    ck.use_table(None)
    assert ran(mask)[0] == {"convmae::masked_conv2d"}


@needs_library
def test_a_table_chooses_for_strides_and_groups(tmp_path, mask):
    def implementations(**options):
        shape = {"side": 4, "channels": 8, "kernel": 3, "batch": 1, "groups": 8}
        return {s.implementation for s in ck.explain("masked_conv2d", **shape | options).steps}

    x = torch.randn(mask.num_visible, 16, 8)
    strided = choice(op="strided_conv2d", stride=2)
    grouped = choice(op="window_conv2d", group_channels=2)
    weight = torch.randn(8, 2, 3, 3)
    expected = ck.masked_conv2d(x, weight, None, mask, groups=4)
    assert implementations(stride=2) == implementations(groups=4) == {"cpu"}
    ck.use_table(write(tmp_path / "t.json", [strided, grouped]))
    assert implementations(stride=2) == implementations(groups=4) == {"pytorch"}
    for other in ({"stride": 1}, {"groups": 2}, {"groups": 4, "stride": 2}):
        assert "cpu" in implementations(**other)
    torch.testing.assert_close(ck.masked_conv2d(x, weight, None, mask, groups=4), expected)


@needs_library
def test_a_named_implementation_keeps_its_name(tmp_path, mask):
    ck.use_table(write(tmp_path / "t.json", [choice()]))
    assert ran(mask, impl="cpu")[0] == {"convmae::masked_conv2d"}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "it is no JSON"),
        (b"\xff\xfe", "it is no text"),
        ("[]", '"format" is not 2'),
        ({"format": 1}, '"format" is not 2'),
        ({"torch": ...}, "it has no 'torch'"),
        ({"kernels": 1}, "'kernels' is not a list"),
        ({"implementations": [{"op": "masked_conv2d"}]}, r"implementations\[0\]: .*missing"),
        ({"implementations": [choice(choice="no")._asdict()]}, r"\[0\]: 'no' is not one of refer"),
        ({"implementations": [choice(dtype="int8")._asdict()]}, r"\[0\]: 'int8' is not one of"),
        (
            {"kernels": [choice(side="4")._asdict()]},
            r"kernels\[0\]: side is '4', expected",
        ),
        ({"device": "a Z80"}, "its device is a Z80, here it is "),
        ({"convmae_kernels": "0.0.1"}, "its convmae_kernels is 0.0.1, here it is "),
        ({"torch": "1.0"}, "its torch is 1.0, here it is "),
    ],
)
def test_a_table_that_does_not_fit_is_ignored_with_one_note(content, why, tmp_path, mask):
    path = tmp_path / "t.json"
    if isinstance(content, dict):
        whole = json.loads(write(path, [choice()]).read_text()) | content
        content = json.dumps({name: value for name, value in whole.items() if value is not ...})
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.warns(RuntimeWarning, match=f"(?s)ignores the table .*t.json: .*{why}") as caught:
        ck.use_table(path)
    assert len(caught) == 1 and choices.in_use() is None
    assert ran(mask)[0] == {"convmae::masked_conv2d"}


@needs_library
def test_a_table_of_kernels_is_what_the_plan_looks_at(tmp_path):
    def kernels(**changes):
        shape = {"side": 4, "channels": 64, "groups": 64, "kernel": 5, "dtype": torch.bfloat16}
        found = ck.explain(
            "masked_conv2d", **{**shape, **changes}, batch=1, device="cuda", capability=(9, 0)
        )
        return [(s.kernel, s.reason) for s in found.steps if s.op == "masked_conv2d"][:1]

    shape = {"dtype": "bfloat16", "kernel": (5, 5), "least": 33, "most": 64, "choice": "any"}
    own = kernels()
    ck.use_table(write(tmp_path / "t.json", kernels=[choice(**shape)]))
    assert kernels() == [("any", "a measured table chose it")] != own
    for other in ({"channels": 128, "groups": 128}, {"side": 8}, {"dtype": torch.float32}):
        assert kernels(**other)[0][0] == "tiles"
    # what was chosen but cannot do the shape
    odd = choice(**shape | {"choice": "tiles", "wide": False})
    ck.use_table(write(tmp_path / "t.json", kernels=[odd]))
    why = "the channels do not fill words of 4 bytes"
    refused = f'a measured table chose "tiles", which cannot: {why}'
    assert kernels(channels=63, groups=63) == [("any", refused)]
    with pytest.warns(RuntimeWarning, match="t.json: .*masked_conv2d has no kernel none"):
        ck.use_table(write(tmp_path / "t.json", kernels=[choice(choice="none")]))
    assert kernels() == own


def test_a_gpus_table_where_torch_has_no_cuda(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.warns(RuntimeWarning, match="it is of a card, and this torch has no CUDA"):
        ck.use_table(write(tmp_path / "t.json", device="a card", capability="9.0"))


@needs_library
def test_measuring_on_the_cpu(tmp_path, monkeypatch):
    """The candidates really run; one that is wrong and one that fails are left out."""
    sizes = Sizes(2, 8, (3, 3), 1, 1)
    problems = [measure.Problem("masked_conv2d", sizes, torch.float32)]
    problems += [
        measure.Problem(op, Sizes(2, 8), torch.float32)
        for op in ("gather_visible", "scatter_visible", "gather_windows")
    ]
    table, left_out = measure.measure(CPU, problems, 1, 0.0)
    assert not left_out and [c.op for c in table.implementations] == [p.op for p in problems]
    assert all(set(c.microseconds) == {"cpu", "reference"} for c in table.implementations)
    first = table.implementations[0]
    assert (first.least, first.most, first.wide, first.default) == (5, 8, True, "cpu")
    choices.write(tmp_path / "t.json", table)
    ck.use_table(tmp_path / "t.json")
    in_use = choices.in_use()
    assert in_use is not None and in_use.implementations == table.implementations

    call = measure.Bench.call
    for spoil, why in (
        (lambda ys: [2 * y for y in ys], "ValueError: a relative error of 1.0e"),
        (lambda ys: 1 / 0, "ZeroDivisionError"),
    ):

        def spoilt(bench, problem, spoil=spoil):
            run = call(bench, problem)
            return lambda impl: spoil(run(impl)) if impl == "cpu" else run(impl)

        monkeypatch.setattr(measure.Bench, "call", spoilt)
        table, left_out = measure.measure(CPU, problems[:1], 1, 0.0)
        assert not table.implementations
        assert [why in line and ": cpu: " in line for line in left_out] == [True]


def test_the_default_stays_where_nothing_is_faster_by_more_than_noise():
    problem = measure.Problem("masked_conv2d", Sizes(4, 256, (5, 5), 1, 1), torch.bfloat16)
    assert measure._choice(problem, {"cuda": 10.0, "triton": 9.9}).choice == "cuda"
    found = measure._choice(problem, {"cuda": 10.0, "triton": 9.0})
    assert (found.choice, found.default, found.least, found.most) == ("triton", "cuda", 129, 256)


def test_the_variable(tmp_path, monkeypatch):
    monkeypatch.setenv(choices.VARIABLE, str(write(tmp_path / "t.json")))
    choices.use_table_of_environment()
    assert choices.in_use().where == str(tmp_path / "t.json")


def test_a_table_that_is_not_there(tmp_path, monkeypatch):
    """Who names it by hand gets an error; a variable that was left behind stops nobody."""
    ck.use_table(write(tmp_path / "t.json"))
    with pytest.raises(FileNotFoundError, match="no table of measured choices .*none.json"):
        ck.use_table(tmp_path / "none.json")
    assert choices.in_use().where == str(tmp_path / "t.json")
    monkeypatch.setenv(choices.VARIABLE, str(tmp_path / "none.json"))
    with pytest.warns(RuntimeWarning, match="none.json: CONVMAE_KERNELS_TABLE names it, but"):
        choices.use_table_of_environment()


def test_a_compiled_program_is_made_of_what_was_chosen(tmp_path, mask):
    recorded = []

    def backend(graph, inputs):
        recorded.append({str(n.target) for n in graph.graph.nodes if "convmae" in str(n.target)})
        return graph.forward

    x, weight = torch.randn(mask.num_visible, 16, 8), torch.randn(8, 1, 3, 3)
    ck.use_table(write(tmp_path / "t.json", [choice()]))

    def run(x):
        return ck.masked_conv2d(x, weight, None, mask, groups=8)

    torch.compile(run, backend=backend, fullgraph=True)(x)
    assert recorded == [set()]


def test_the_command_writes_a_table_that_is_in_use_then(tmp_path, monkeypatch, capsys):
    small = measure.Problem("masked_conv2d", Sizes(2, 8, (3, 3), 1, 1), torch.float32)
    monkeypatch.setattr(measure, "problems", lambda device: [small])
    path = tmp_path / "results" / "t.json"
    measure.main(["--out", str(path), "--device", "cpu", "--batch", "1", "--seconds", "0"])
    said = capsys.readouterr().out.splitlines()
    assert said[-1].startswith(f"table in use: {path}, 1 choices, ") or WHY_NOT_COMPILED
