"""Forecasting: series in CSV files as ETT has them, a model of them to train, its errors beside the last value's."""

import csv
import itertools
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import mmengine.registry
import numpy as np
import torch
from matplotlib.axes import Axes
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS, MODELS
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from .errors import InputError
from .files import write_atomically
from .task import Job, TimmModel


class Table(NamedTuple):
    """A series: the dates of its rows, the names of its variates, and float32 values ``(rows, variates)``."""

    dates: list[str]
    names: list[str]
    values: np.ndarray


def read_series(path: str | Path) -> Table:
    """A CSV file with a header, a date first in each row and then a number for each variate, as ETT has it.

    InputError where it is not there or anything else; the message names the row.
    """
    try:
        with open(path, newline="") as file:
            header, *rows = [row for row in csv.reader(file) if row] or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise InputError(f"cannot read series {str(path)!r}; expected a CSV file ({e})") from e
    if len(header) < 2 or header[0] != "date":
        raise InputError(f"series {str(path)!r} begins with {header[:2]}; expected the columns date, and its variates")
    values = np.empty((len(rows), len(header) - 1), np.float32)
    for i, row in enumerate(rows):
        try:
            values[i] = [float(cell) for cell in row[1:]]
        except ValueError as e:
            raise InputError(
                f"series {str(path)!r}, row {i + 2}: {row[1:]}; expected {len(header) - 1} numbers behind the date"
            ) from e
    if not np.isfinite(values).all():
        bad = int(np.flatnonzero(~np.isfinite(values).all(1))[0])
        raise InputError(f"series {str(path)!r}, row {bad + 2}: {rows[bad][1:]}; expected finite numbers")
    return Table([row[0] for row in rows], header[1:], values)


PARTS = ("train", "val", "test")


@mmengine.registry.DATASETS.register_module()
class Series(Dataset):
    """Windows of a series: `inputs`, the steps so far ``(M, context)``, and `targets` that follow ``(M, horizon)``.

    Values are in units of the training rows' deviation around their mean, as the field reports errors.

    Args:
        data_root: folder of the file.
        file: its name; see `read_series`.
        part: "train", "val" or "test".
        context, horizon: steps.
        rows: rows of the three parts, one after the other; those behind them are left out. What is foretold lies in the
            part, what is seen may lie before it.

    Raises:
        InputError: the file is missing or no series, too short, or there is no such part.
    """

    def __init__(
        self, data_root: str, file: str, part: str, context: int, horizon: int, rows: Sequence[int] = (8640, 2880, 2880)
    ):
        table = read_series(Path(data_root, file))
        if part not in PARTS or len(rows) != 3 or min(rows) < 1:
            raise InputError(f"part={part!r}, rows={tuple(rows)}; expected one of {PARTS}, and three positive numbers")
        end = [0, *itertools.accumulate(rows)]
        at = PARTS.index(part)
        first, last = max(end[at] - context, 0), end[at + 1]
        self.context, self.horizon = context, horizon
        if last > len(table.values) or last - first < context + horizon:
            raise InputError(
                f"series {str(Path(data_root, file))!r} has {len(table.values)} rows, part {part!r} rows {first} to "
                f"{last}; expected them to be there, and {context} + {horizon} at least"
            )
        train = table.values[: rows[0]]
        scaled = (table.values - train.mean(0)) / (train.std(0) + 1e-8)
        self.values = torch.from_numpy(scaled[first:last]).T.contiguous()

    def __len__(self):
        return self.values.shape[1] - self.context - self.horizon + 1

    def __getitem__(self, index: int) -> dict:
        seen = index + self.context
        return {"inputs": self.values[:, index:seen], "targets": self.values[:, seen : seen + self.horizon]}

    @staticmethod
    def check(settings: dict, cfg: Config) -> None:
        """InputError where the files are not as they should be, or the model reads or foretells other lengths."""
        Series(**{key: value for key, value in settings.items() if key != "type"})
        for key in ("context", "horizon"):
            if settings[key] != cfg.model.get(key, settings[key]):
                raise InputError(f"config key model.{key}={cfg.model[key]}: the data set has {settings[key]}")


@MODELS.register_module()
class Forecaster(TimmModel):
    """A model of series, trained by the mean squared error."""

    kinds = ("forecasting",)
    inputs, read = ("series", (".csv",)), staticmethod(read_series)

    def forward(self, inputs: Tensor, targets: Tensor | None = None, mode: str = "tensor") -> Any:
        """Series ``(B, M, T)`` to what follows ``(B, M, H)`` ("tensor"), to the loss, or to errors ("predict").

        The errors are, of each window, "MSE" and "MAE", and "last_MSE" and "last_MAE" of the last value kept.
        """
        y = self.model(inputs)
        if mode == "tensor":
            return y
        if mode == "loss":
            return {"loss": F.mse_loss(y.float(), targets)}
        errors = {}
        for name, guess in (("", y.float()), ("last_", inputs[..., -1:].expand_as(targets))):
            errors[f"{name}MSE"] = (guess - targets).square().flatten(1).mean(1)
            errors[f"{name}MAE"] = (guess - targets).abs().flatten(1).mean(1)
        return [{name: error[i].item() for name, error in errors.items()} for i in range(len(y))]

    def predict_files(self, job: Job) -> list[dict]:
        """Of each file its path and that of the rows that follow it, in its units, a CSV file as well."""
        device, results = next(self.parameters()).device, []
        for path, file in zip(job.inputs, job.place("forecasts", ".csv"), strict=True):
            dates, names, values = read_series(path)
            if len(values) < self.model.context:
                raise InputError(f"series {str(path)!r} has {len(values)} rows; expected {self.model.context} at least")
            mean, deviation = values.mean(0), values.std(0) + 1e-8
            seen = torch.from_numpy((values[-self.model.context :] - mean) / deviation).T[None].to(device)
            made = self.model(seen)[0].T.cpu().numpy() * deviation + mean
            rows = [[date, *row] for date, row in zip(_dates_after(dates, len(made)), made.tolist(), strict=True)]
            write_atomically(file, lambda partial, names=names, rows=rows: _write(["date", *names], rows, partial))
            results.append({"path": str(path), "forecast": str(file)})
        return results

    @staticmethod
    def draw(axis: Axes, result: dict) -> None:
        """The last variate: as many steps as are foretold, and these."""
        made, seen = read_series(result["forecast"]), read_series(result["path"])
        last, follows = seen.values[-len(made.values) :, -1], made.values[:, -1]
        axis.plot(range(-len(last), 0), last, color="black", linewidth=0.8)
        axis.plot(range(len(follows)), follows, color="tab:blue", linewidth=0.8)
        axis.set_title(made.names[-1], fontsize=8)


def _dates_after(dates: list[str], count: int) -> list[str]:
    """Dates that go on as the last two do; numbers of steps where they are no dates."""
    try:
        before, last = (datetime.fromisoformat(date) for date in dates[-2:])
        return [str(last + (i + 1) * (last - before)) for i in range(count)]
    except ValueError:
        return [f"+{i + 1}" for i in range(count)]


def _write(header: list[str], rows: list[list], path: Path) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


@METRICS.register_module()
class ForecastMetric(BaseMetric):
    """Mean squared and absolute errors over all windows, in units of the training rows' deviation."""

    default_prefix = "forecast"

    def process(self, data_batch: Any, data_samples: Sequence[Any]) -> None:
        """Collect the errors of each window."""
        self.results.extend(data_samples)

    def compute_metrics(self, results: list) -> dict[str, float]:
        """The means, of the model and of the last value kept."""
        return {name: float(np.mean([errors[name] for errors in results])) for name in results[0]}
