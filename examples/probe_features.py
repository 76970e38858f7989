"""A linear classifier on features of a frozen network: what they tell about the classes.

    convmae embed --checkpoint runs/mine --data_path pictures --split train --output train.npz
    convmae embed --checkpoint runs/mine --data_path pictures --split val --output val.npz
    python -m examples.probe_features train.npz val.npz --shares 0.01 0.1 1 --output probe.json

fits scikit-learn's logistic regression to the features of `train.npz`, until it has converged, and
prints the accuracy on `val.npz`. The strength of its regularisation is chosen by cross-validation
among the labelled pictures, so nothing has to be set by hand, and nothing is chosen by `val.npz`.

`convmae linprobe` is the official way: the same head, trained by the official optimizer on random
crops, for ninety epochs. This one sees each picture once, whole, and takes seconds.

With a share of the labels, `--seeds` choose which: those that `--max_samples` of `convmae finetune`
chooses with the same `--seed`, evenly over the classes.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from convmae.data.source import choose_balanced
from examples.compare_starts import replace_text

if TYPE_CHECKING:
    from collections.abc import Sequence

STRENGTHS = tuple(10.0**power for power in range(-5, 2))  # scikit-learn's C, on unit variances
FOLDS = 5
MAX_STEPS = 5000  # of the solver, which ends long before


@dataclass(frozen=True)
class Features:
    """What `convmae embed` has written.

    Attributes:
        values: `[N, D]`.
        labels: the class of each picture, `[N]`.
    """

    values: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Sequence[int]) -> Features:
        return Features(self.values[indices], self.labels[indices])


class _Labelled:
    """The labels of features, as numbers, in the form in which pictures are chosen."""

    def __init__(self, features: Features) -> None:
        self.classes, self.numbers = np.unique(features.labels, return_inverse=True)

    def __len__(self) -> int:
        return len(self.numbers)

    def label(self, index: int) -> int:
        return int(self.numbers[index])


def read_features(file: Path) -> Features:
    """The features and labels of a `.npz` of `convmae embed`; unreadable pictures are left out.

    Raises:
        ValueError: it is no such file, has maps in place of vectors, no labels or no pictures.
    """
    if not file.is_file() or not zipfile.is_zipfile(file):
        what = "is something else" if file.exists() else "does not exist"
        raise ValueError(f"{file} {what}; expected a .npz file of convmae embed")
    with np.load(file) as content:
        arrays = {name: content[name] for name in content.files}
    missing = [name for name in ("features", "label", "error") if name not in arrays]
    if missing:
        raise ValueError(
            f"{file} has no array {missing[0]!r}; expected features of pictures in class folders, "
            "written by convmae embed"
        )
    values = arrays["features"]
    if values.ndim != 2:
        raise ValueError(
            f"{file}: features of shape {list(values.shape)}, expected [pictures, channels]: "
            "convmae embed --features pooled"
        )
    good = arrays["error"] == ""
    if not good.any():
        raise ValueError(f"{file} has no picture that could be read")
    return Features(values[good].astype(np.float64), arrays["label"][good])


def choose(features: Features, share: float, seed: int) -> Features:
    """This share of the pictures, the same number of each class as far as there are enough."""
    labelled: Any = _Labelled(features)
    count = max(1, round(share * len(features)))
    chosen: Any = choose_balanced(labelled, count, seed, classes=len(labelled.classes))
    return features[list(chosen.indices)]


def accuracy(train: Features, test: Features, seed: int) -> tuple[float, float]:
    """Fits the classifier, and tries it out.

    Returns:
        The accuracy on `test` in per cent, and the `C` that cross-validation has chosen.

    Raises:
        ValueError: a class has fewer than two labelled pictures, or there is one class only; the
            solver has not converged.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classes, counts = np.unique(train.labels, return_counts=True)
    if len(classes) < 2 or counts.min() < 2:
        raise ValueError(
            f"{len(train)} labelled pictures of {len(classes)} classes, {counts.min()} of "
            f"'{classes[counts.argmin()]}'; expected two classes or more, and two pictures of each"
        )
    folds = StratifiedKFold(min(FOLDS, int(counts.min())), shuffle=True, random_state=seed)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=MAX_STEPS))
    search = GridSearchCV(
        classifier,
        {"logisticregression__C": STRENGTHS},
        scoring="neg_log_loss",
        cv=folds,
        error_score="raise",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        try:
            search.fit(train.values, train.labels)
        except ConvergenceWarning as warning:
            raise ValueError(f"the classifier has not converged: {warning}") from None
    right = search.predict(test.values) == test.labels
    return 100 * float(right.mean()), search.best_params_["logisticregression__C"]


def probe(
    train: Features, test: Features, shares: Sequence[float], seeds: Sequence[int]
) -> list[dict[str, float]]:
    """The accuracy with each share of the labels, and each seed.

    Returns:
        A dict for each: `share`, `seed`, `labels` (how many), `acc1` (per cent), `C`, `seconds`.

    Raises:
        ValueError: too few pictures of a class.
    """
    runs = []
    for share in shares:
        for seed in seeds:
            begin = time.monotonic()
            labelled = choose(train, share, seed)
            acc1, strength = accuracy(labelled, test, seed)
            runs.append(
                {
                    "share": share,
                    "seed": seed,
                    "labels": len(labelled),
                    "acc1": acc1,
                    "C": strength,
                    "seconds": round(time.monotonic() - begin, 1),
                }
            )
    return runs


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("train", type=Path, help="features to learn from, a .npz of convmae embed")
    add("test", type=Path, help="features to try it out on")
    add("--shares", type=float, nargs="+", default=[1.0], metavar="X", help="of the labels")
    add("--seeds", type=int, nargs="+", default=[0], metavar="N", help="which labels, which folds")
    add("--output", type=Path, help="a .json file for the results")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command; returns 0, or 2 for wrong input."""
    parser = options()
    args = parser.parse_args(arguments)
    if not all(0 < share <= 1 and math.isfinite(share) for share in args.shares):
        parser.error(f"--shares {args.shares}: expected numbers above 0 and up to 1")
    if min(args.seeds) < 0:
        parser.error(f"--seeds {args.seeds}: expected numbers of 0 or more")
    if args.output is not None and not args.output.parent.is_dir():
        parser.error(f"--output {args.output}: {args.output.parent} is no folder")
    try:
        train, test = read_features(args.train), read_features(args.test)
        if train.values.shape[1] != test.values.shape[1]:
            raise ValueError(
                f"{args.train} has {train.values.shape[1]} channels and {args.test} "
                f"{test.values.shape[1]}; expected features of one network"
            )
        unknown = sorted(set(test.labels) - set(train.labels))
        if unknown:
            raise ValueError(f"{args.test} has the class '{unknown[0]}', {args.train} has not")
        runs = probe(train, test, args.shares, args.seeds)
    except ValueError as error:
        print(f"probe_features: {error}", file=sys.stderr)
        return 2
    for run in runs:
        print(
            f"{run['labels']} labels, seed {run['seed']}: accuracy {run['acc1']:.2f} %  "
            f"(C {run['C']:g}, {run['seconds']:.1f} s)"
        )
    if args.output is not None:
        replace_text(args.output, json.dumps(runs, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
