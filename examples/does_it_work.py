"""Does masked pretraining help? Networks from three starts, probed and finetuned with few labels.

    make emoji
    python -m examples.does_it_work emoji --budget short --output_dir runs/emoji-short

`docs/does_it_work.md` says what is compared, and why. For each network (`NETWORKS`):

1. pretraining on the pictures without labels, several times with the same options: `masked`, which
   is `convmae pretrain`, and `leaky` and `zeroed`, which are `examples/dense_pretrain.py`, without
   masked convolution;
2. from `random` weights and from these, with 1 %, 10 % and all of the labels and several seeds:
   `probe`, a linear classifier on the features that `convmae embed` computes
   (`examples/probe_features.py`), and `convmae finetune` (`examples/compare_starts.py`).

A seed chooses the labelled pictures, the head, random weights, crops and their order; it chooses
the same pictures whatever the start. All starts take the same steps with the same options.

Killed and started again it goes on: what is done is skipped. Several processes may share the folder
if each has other `--networks`. It writes

    OUTPUT/results.md      the tables, after every part
    OUTPUT/results.json    all accuracies, losses, times, options, versions
    OUTPUT/results.png     accuracy by labels, at the end
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from convmae import create_model
from convmae.config import MessageError
from convmae.data.open import open_source
from convmae.weights.checkpoint import Weights, open_weights, save_weights
from examples import compare_starts
from examples.compare_starts import INTERRUPTED, RANDOM, execute, replace_text
from examples.does_it_work_results import FINETUNE, PROBE, part_name, plot, report

DATA = ("emoji", "fashion-mnist-small", "fashion-mnist")
PRETRAININGS = {  # the module that pretrains, and what comes before the file of options
    "masked": ("convmae", "pretrain", "--config"),
    "leaky": ("examples.dense_pretrain", "leaky"),
    "zeroed": ("examples.dense_pretrain", "zeroed"),
}
NEVER = 1_000_000  # epochs: later than the end of a run, whose last step is evaluated and saved
WARM_UP = 0.1  # of the steps
SAVES = 20  # of a pretraining


@dataclass(frozen=True)
class Network:
    """A network, as it is pretrained and as it classifies.

    Attributes:
        size: of the pictures, in pixels a side.
        pretrain: options of `convmae pretrain`.
        classify: options of `convmae finetune`.
    """

    size: int
    pretrain: dict[str, Any]
    classify: dict[str, Any]


NETWORKS = {
    "convmae": Network(64, {"model": "convmae_tiny"}, {"model": "convvit_tiny"}),
    "cnn": Network(
        96,
        {"model": "timm:resnet10t", "method": "spark", "decoder_width": 64},
        {"model": "timm:resnet10t"},
    ),
}
PRETRAIN: dict[str, Any] = {
    "batch_size": 32,
    "lr": 1e-3,
    "weight_decay": 0.05,
    "min_crop": 0.5,
    "hflip": 0.5,
    "norm_pix_loss": True,
    "clip_grad": 1,
}
CLASSIFY: dict[str, Any] = {
    "lr": 1e-3,
    "layer_decay": 1,  # less would slow the lower layers of random weights too
    "weight_decay": 0.05,
    "clip_grad": 1,
    "min_crop": 0.6,
    "aa": "none",
    "smoothing": 0.1,
    "reprob": 0,
    "mixup": 0,
    "cutmix": 0,
    "drop_path": 0,
    "crop_pct": 1,
}
CLASSIFY_BATCH = 32


@dataclass(frozen=True)
class Budget:
    """How long everything is trained, in steps of the optimizer.

    Attributes:
        pretrain: steps of each pretraining, by network.
        finetune: steps by share of the labels, each one of `SHARES`; these are probed as well.
        seeds: of probes and finetuning.
    """

    pretrain: dict[str, int]
    finetune: dict[float, int]
    seeds: tuple[int, ...] = (0, 1, 2)


BUDGETS = {
    "smoke": Budget({"convmae": 4, "cnn": 4}, {0.1: 2}, (0,)),
    "short": Budget({"convmae": 3500, "cnn": 1200}, {0.01: 60, 0.1: 120, 1.0: 300}),
    "full": Budget({"convmae": 40_000, "cnn": 20_000}, {0.01: 200, 0.1: 500, 1.0: 2000}),
}


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("data", choices=DATA)
    add("--data_path", help="where it lies; data/NAME if absent, where make puts it")
    add("--budget", choices=list(BUDGETS), default="short")
    add(
        "--pretrainings",
        nargs="+",
        choices=list(PRETRAININGS),
        default=["masked", "leaky"],
        help="what is compared with random weights",
    )
    add("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    add(
        "--pretrain_seed",
        type=int,
        default=0,
        metavar="N",
        help="of every pretraining: first weights, crops, masks; another one needs another folder",
    )
    add("--output_dir", type=Path, required=True)
    return parser


def main(arguments: list[str] | None = None, run: Any = execute) -> dict[str, Any]:
    """Runs what is not done yet; returns the content of `results.json`.

    Args:
        arguments: of the command line.
        run: runs a program, as `compare_starts.execute` does.
    """
    parser = options()
    args = parser.parse_args(arguments)
    if args.pretrain_seed < 0:
        parser.error(f"--pretrain_seed {args.pretrain_seed}: expected a number of 0 or more")
    for flag in ("pretrainings", "networks"):
        names = getattr(args, flag)
        if len(set(names)) != len(names):
            parser.error(f"--{flag} {' '.join(names)}: expected each name once")
    path = Path(args.data_path or f"data/{args.data}")
    if not path.is_dir():
        parser.error(f"--data_path: {path} is no folder; `make {args.data}` makes data/{args.data}")
    try:
        pictures = open_source(str(path)).pictures
    except MessageError as error:
        parser.error(error.with_flags)
    setting = {
        "data": args.data,
        "data_path": str(path),
        "pictures": pictures,
        "pretrainings": list(args.pretrainings),
        "pretrain_seed": args.pretrain_seed,
        "budget": asdict(BUDGETS[args.budget]),
    }
    try:
        begin(args.output_dir, setting)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"--output_dir: {args.output_dir} cannot be written: {error}")
    for name in args.networks:
        budget = BUDGETS[args.budget]
        seed = args.pretrain_seed
        work = Work(
            args.output_dir, name, str(path), pictures, args.pretrainings, seed, budget, run
        )
        for start in work.pretrainings:
            work.pretrain(start)
            report(args.output_dir)
        work.probe()
        report(args.output_dir)
        for share, steps in budget.finetune.items():
            work.finetune(share, steps)
            report(args.output_dir)
    content = report(args.output_dir)
    plot(content, args.output_dir / "results.png")
    print((args.output_dir / "results.md").read_text())
    return content


def begin(output: Path, setting: dict[str, Any]) -> None:
    """Notes the setting of a new folder, or compares it with that of an old one.

    Raises:
        ValueError: they differ.
    """
    setting = json.loads(json.dumps(setting))
    file = output / "setting.json"
    if file.is_file():
        found = json.loads(file.read_text())
        changed = [name for name in setting if found.get(name) != setting[name]]
        if changed:
            raise ValueError(
                f"--output_dir: {output} holds results of another {' and another '.join(changed)} "
                f"({found.get(changed[0])}, now {setting[changed[0]]}); name a new folder"
            )
        return
    output.mkdir(parents=True, exist_ok=True)
    replace_text(file, json.dumps(setting, indent=1) + "\n")


# -- runs ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """All runs of one network.

    Attributes:
        output: the folder of all networks.
        name: one of `NETWORKS`.
        data_path, pictures: of the training pictures, and how many there are.
        pretrainings: of `PRETRAININGS`.
        pretrain_seed: of every one of them.
        budget: the steps, and the seeds of probes and finetuning.
        run: runs a program, as `compare_starts.execute` does.
    """

    output: Path
    name: str
    data_path: str
    pictures: int
    pretrainings: list[str]
    pretrain_seed: int
    budget: Budget
    run: Any

    @property
    def folder(self) -> Path:
        """Where the runs of this network are."""
        return self.output / self.name

    def pretrain(self, start: str) -> None:
        """One pretraining, or what is left of it.

        Raises:
            SystemExit: it failed or was interrupted.
        """
        folder, steps = self.folder / start, self.budget.pretrain[self.name]
        done, output = folder.with_suffix(".done"), folder.with_suffix(".txt")
        if done.is_file():
            print(f"{self.name}, {start}: done before")
            return
        network, batch = NETWORKS[self.name], PRETRAIN["batch_size"]
        config = PRETRAIN | network.pretrain | self.lengths(self.pictures, batch, steps)
        config |= {
            "input_size": network.size,
            "data_path": self.data_path,
            "output_dir": str(folder),
            "resume": "auto",
            "seed": self.pretrain_seed,
            "save_every": steps / SAVES / max(1, self.pictures // batch),
        }
        module, *words = [*PRETRAININGS[start], str(self.recipe(start, config))]
        self.must_run(words, output, module)
        replace_text(done, f"{steps} steps\n")

    def probe(self) -> None:
        """The linear classifier on features of every start, with each share of the labels.

        Raises:
            SystemExit: a program failed or was interrupted.
        """
        seeds = [str(seed) for seed in self.budget.seeds]
        trained = open_weights(self.folder / self.pretrainings[0])
        starts = {start: (str(self.folder / start), seeds) for start in self.pretrainings}
        for seed in seeds:
            drawn = self.folder / PROBE / f"{RANDOM}-{seed}"
            if not drawn.is_dir():
                draw(trained, int(seed), drawn)
            starts[drawn.name] = (str(drawn), [seed])
        for name, (weights, of_start) in starts.items():
            result = self.folder / PROBE / f"{name}.json"
            if result.is_file():
                print(f"{self.name}, probe of {name}: done before")
                continue
            files = [str(result.with_name(f"{name}-{split}.npz")) for split in ("train", "val")]
            for split, file in zip(("train", "val"), files):
                flags = ["embed", "--checkpoint", weights, "--data_path", self.data_path]
                flags += ["--split", split, "--output", file, "--overwrite", "--num_workers", "0"]
                flags += ["--input_size", str(NETWORKS[self.name].size), "--crop_pct", "1"]
                self.must_run([*flags, "--amp", "float32"], result.with_suffix(".txt"), "convmae")
            shares = [str(share) for share in self.budget.finetune]
            flags = [*files, "--shares", *shares, "--seeds", *of_start, "--output", str(result)]
            self.must_run(flags, result.with_suffix(".txt"), "examples.probe_features")

    def finetune(self, share: float, steps: int) -> None:
        """All starts and seeds with a share of the labels, of so many steps each.

        Raises:
            SystemExit: a run failed or was interrupted.
        """
        network, labels = NETWORKS[self.name], max(1, round(share * self.pictures))
        batch = min(CLASSIFY_BATCH, labels)
        config = CLASSIFY | network.classify | self.lengths(labels, batch, steps)
        config |= {
            "input_size": network.size,
            "max_samples": labels,
            "eval_every": NEVER,
            "eval_batch_size": 128,
            "save_every": NEVER,
        }
        weights = [f"{start}={self.folder / start}" for start in self.pretrainings]
        part = part_name(FINETUNE, share)
        flags = [FINETUNE, "--config", str(self.recipe(part, config))]
        flags += ["--data_path", self.data_path, "--starts", RANDOM, *weights]
        flags += ["--seeds", *map(str, self.budget.seeds), "--metrics", "acc1"]
        flags += ["--output_dir", str(self.folder / part)]
        compare_starts.main(flags, self.run)

    def must_run(self, words: list[str], output: Path, module: str) -> None:
        """Runs a program, and ends this one if that fails or is interrupted.

        Raises:
            SystemExit: it did.
        """
        print(f"{self.name}: python -m {module} {' '.join(words)}", flush=True)
        status, printed = self.run(words, output, module)
        if status or INTERRUPTED in printed:
            reason = f"exit status {status}" if status else "a signal ended it"
            raise SystemExit(
                f"{self.name}, {output.stem}: {reason}; see {output}. The same command goes on "
                "from here."
            )

    @staticmethod
    def lengths(pictures: int, batch: int, steps: int) -> dict[str, Any]:
        """The options of a run of so many steps."""
        warm_up = WARM_UP * steps / max(1, pictures // batch)
        return {"batch_size": batch, "steps": steps, "warmup_epochs": warm_up, "num_workers": 0}

    def recipe(self, name: str, config: dict[str, Any]) -> Path:
        """Writes a file of options, and returns its path."""
        file = self.folder / "recipes" / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"{key}: {json.dumps(value)}\n" for key, value in config.items()]
        replace_text(file, "".join(lines))
        return file


def draw(like: Weights, seed: int, folder: Path) -> None:
    """Stores the network of these weights as its pretraining would begin with this seed."""
    torch.manual_seed(seed)
    model = create_model(like.model, **like.config)
    fresh = folder.with_name(f".new.{folder.name}")
    save_weights(fresh, model, like.model, pictures=like.pictures, reading=like.reading)
    fresh.rename(folder)


if __name__ == "__main__":
    main()
