"""`convmae predict`: classes of pictures, as a table."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from convmae.commands.inference import Job, Loaded, mark_not_finite, report, run
from convmae.config import OptionError, WeightsError, for_option
from convmae.models import ConvViT
from convmae.models.cnn.classifier import TimmClassifier
from convmae.records.row_files import (
    legible,
    new_text,
    regrouped,
    write_csv,
    write_jsonl,
    write_parquet,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    import numpy as np
    from torch import Tensor

    from convmae.commands.inference import RowsSummary
    from convmae.config import PredictConfig
    from convmae.records.parts import Parts, Rows


def predict(config: PredictConfig) -> RowsSummary:
    """Classifies pictures and writes a table of their names, classes and probabilities.

    A row has `name`, `label` (the true class; only where the pictures lie in folders of classes, or
    have labels, that the model knows), `prediction`, `probability` (of all classes, softmax in
    float32), with `topk` above 1 `prediction_2`, `probability_2` and so on, with `scores` a column
    `probability:CLASS` or `logit:CLASS` for each class, and `error`: why there is no prediction.

    Returns:
        Counts and speed; the rows are in `config.output`, or were printed.

    Raises:
        OptionError (a ValueError): an option cannot work, or the checkpoint is no classifier.
        convmae.data.DataError (a ValueError): no such pictures.
        convmae.records.parts.WriteError: the disk refused; what was stored before is kept.
        KeyboardInterrupt: Ctrl-C; what was computed is stored.
    """
    return run(config, lambda loaded: _Prediction(config, loaded))


class _Prediction(Job):
    """The best classes and their probabilities."""

    def __init__(self, config: PredictConfig, loaded: Loaded) -> None:
        self.config, self.model = config, loaded.model
        if not isinstance(self.model, ConvViT | TimmClassifier):
            raise OptionError(
                f"--checkpoint {config.checkpoint!r} is a {type(self.model).__name__}, which does "
                "not classify; `convmae finetune` or `convmae linprobe` makes a classifier of it, "
                "and `convmae embed` computes its features"
            )
        count = self.model.num_classes
        if count == 0 or self.model.config["global_pool"] == "":
            raise OptionError(
                f"--checkpoint {config.checkpoint!r} is an encoder without a classifier; `convmae "
                "finetune` or `convmae linprobe` trains one, and `convmae embed` computes features"
            )
        if config.topk > count:
            raise OptionError(
                f"--topk {config.topk} is more than the {count} classes of --checkpoint "
                f"{config.checkpoint!r}"
            )
        with for_option("checkpoint"):
            self.classes = class_names(loaded, count)

    def compute(self, images: Tensor) -> dict[str, Tensor]:
        logits = self.model(images).float()
        probabilities = logits.softmax(1)
        best = probabilities.topk(self.config.topk, dim=1)
        columns = {"classes": best.indices, "probabilities": best.values, "logits": logits}
        if self.config.scores == "probabilities":
            columns["scores"] = probabilities
        return columns

    def finish(self, columns: dict[str, np.ndarray], reasons: list[str]) -> dict[str, np.ndarray]:
        logits = columns.pop("logits")
        mark_not_finite(logits, reasons)
        if self.config.scores == "logits":
            columns["scores"] = logits
        return columns

    # -- the table --------------------------------------------------------------------------------

    def columns(self) -> list[str]:
        """The names of the columns, in order."""
        names = ["name"]
        if self.true_classes is not None:
            names.append("label")
        for place in range(1, self.config.topk + 1):
            suffix = "" if place == 1 else f"_{place}"
            names += [f"prediction{suffix}", f"probability{suffix}"]
        return [*names, *self._score_columns(), "error"]

    def _score_columns(self) -> list[str]:
        what = {"probabilities": "probability", "logits": "logit"}.get(self.config.scores)
        return [] if what is None else [f"{what}:{name}" for name in self.classes or ()]

    def records(self, parts: Iterable[Rows]) -> Iterator[dict[str, Any]]:
        """A dictionary by column for each row; None where there is nothing."""
        columns, classes = self.columns(), self.classes or []
        true, values = self.true_classes, len(self._score_columns())
        for rows in parts:
            best = rows.columns["classes"].tolist()
            shares = rows.columns["probabilities"].tolist()
            scores = rows.columns["scores"].tolist() if values else [[]] * len(rows)
            for place, (name, label, reason) in enumerate(
                zip(rows.names, rows.labels.tolist(), rows.reasons)
            ):
                row: list[Any] = [legible(name)]
                if true is not None:
                    row.append(true[label] if label >= 0 else None)
                if reason:
                    row += [None] * (2 * self.config.topk + values)
                else:
                    for number, share in zip(best[place], shares[place]):
                        row += [classes[number], share]
                    row += scores[place]
                yield dict(zip(columns, [*row, legible(reason) or None], strict=True))

    def write(self, parts: Parts, output: Path | None) -> None:
        kind, columns = self.config.table_format, self.columns()
        if kind == "parquet":
            assert output is not None
            write_parquet(map(self._arrow_table, regrouped(parts.read())), output)
            return
        records = self.records(parts.read())
        if output is not None:
            with new_text(output) as opened:
                write_text(kind, records, columns, opened)
        else:
            write_text(kind, records, columns, sys.stdout)
            sys.stdout.flush()

    def _arrow_table(self, rows: Rows) -> Any:
        import pyarrow as arrow

        numbers = ("probability", "logit")
        fields = [
            arrow.field(name, arrow.float32() if name.startswith(numbers) else arrow.string())
            for name in self.columns()
        ]
        return arrow.Table.from_pylist(list(self.records([rows])), schema=arrow.schema(fields))


def write_text(
    kind: str, records: Iterable[dict[str, Any]], columns: list[str], opened: Any
) -> None:
    """The records as `csv` or `jsonl`."""
    if kind == "csv":
        write_csv(records, columns, opened)
    else:
        write_jsonl(records, opened)


def class_names(loaded: Loaded, count: int) -> list[str]:
    """The names of the classes in a checkpoint, their numbers where it has none.

    Raises:
        WeightsError: it has more names than classes, or a name twice.
    """
    names = list(loaded.weights.classes or ())
    if len(names) > count:
        raise WeightsError(
            f"{loaded.weights.path} names {len(names)} classes, but its model has {count}"
        )
    names += [str(number) for number in range(len(names), count)]
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise WeightsError(f"{loaded.weights.path} has two classes of the name {name!r}")
        seen.add(name)
    return names


def main(config: PredictConfig) -> int:
    """The command: `predict`, and what it says of itself; returns the exit status."""
    return report(predict(config))
