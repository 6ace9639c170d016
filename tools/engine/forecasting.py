"""Forecasting: series in CSV files in ETT's format, a model to train, and its errors beside those of the last value."""

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
    """Reads a CSV file in ETT's format: a header, then in each row a date and a number for each variate.

    InputError if it is missing or different; the message names the row.
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

    Values are in units of the training rows' deviation around their mean, as is usual for reported errors.

    Args:
        data_root: folder of the file.
        file: its name; see `read_series`.
        part: "train", "val" or "test".
        context, horizon: steps.
        rows: rows of the three parts, one after the other; rows after them are left out. The forecast lies in the
            part; the input may lie before it.

    Raises:
        InputError: the file is missing, is not a series or is too short, or there is no such part.
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
        """InputError if the files are wrong, or the model reads or forecasts other lengths."""
        Series(**{key: value for key, value in settings.items() if key != "type"})
        for key in ("context", "horizon"):
            if settings[key] != cfg.model.get(key, settings[key]):
                raise InputError(f"config key model.{key}={cfg.model[key]}: the data set has {settings[key]}")


@MODELS.register_module()
class Forecaster(TimmModel):
    """A model of series, trained with the mean squared error."""

    kinds = ("forecasting",)
    inputs, read = ("series", (".csv",)), staticmethod(read_series)

    def forward(self, inputs: Tensor, targets: Tensor | None = None, mode: str = "tensor") -> Any:
        """Series ``(B, M, T)`` to their continuation ``(B, M, H)`` ("tensor"), to the loss, or to errors ("predict").

        The errors of each window are "MSE" and "MAE", and "last_MSE" and "last_MAE" for repeating the last value.
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
        """For each file: its path and that of the forecast rows, a CSV file in the same units."""
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
        """The last variate: the forecast steps, and as many steps before them."""
        made, seen = read_series(result["forecast"]), read_series(result["path"])
        last, follows = seen.values[-len(made.values) :, -1], made.values[:, -1]
        axis.plot(range(-len(last), 0), last, color="black", linewidth=0.8)
        axis.plot(range(len(follows)), follows, color="tab:blue", linewidth=0.8)
        axis.set_title(made.names[-1], fontsize=8)


def _dates_after(dates: list[str], count: int) -> list[str]:
    """Dates that continue at the interval of the last two; step numbers if they are not dates."""
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
        """Collects the errors of each window."""
        self.results.extend(data_samples)

    def compute_metrics(self, results: list) -> dict[str, float]:
        """The means, for the model and for repeating the last value."""
        return {name: float(np.mean([errors[name] for errors in results])) for name in results[0]}
