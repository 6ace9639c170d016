"""Reports the results of a fine-tuned model in one HTML file that contains all its pictures."""

import base64
import html
import json
import string
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix, precision_recall_fscore_support

from .files import write_atomically
from .images import read_labels, read_rgb
from .layouts import TaskName

SHOWN = 12  # mistakes in the report
PAGE = string.Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>$title</title><style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .2rem .8rem; border-bottom: 1px solid #ddd }
td { text-align: right } td:first-child, th:first-child { text-align: left } img { max-width: 100% }
</style></head><body><h1>$title</h1>
$body
</body></html>
""")


def write_report(
    work_dir: Path, task: TaskName, model: str, metrics: dict[str, float], results: list[dict] | None
) -> Path:
    """Write `work_dir/report.html`: metrics, curves, tables by class, and the worst mistakes.

    Args:
        work_dir: contains curves.png and the arranged data.
        metrics: of the best weights.
        results: the predictions for the validation images; None if these are not in files.
    """
    parts = [_table(("metric", "value"), [(name, f"{value:.4g}") for name, value in metrics.items()])]
    parts += _section("Training", [work_dir / "curves.png"])
    if results is not None:
        shown = {"cls": _of_classes, "seg": _of_maps, "det": _of_objects, "restore": _of_images}
        parts += shown[task](work_dir, results)
    page = PAGE.substitute(title=html.escape(f"{model} on {work_dir.name}"), body="\n".join(parts))
    report = work_dir / "report.html"
    write_atomically(report, lambda partial: partial.write_text(page, encoding="utf-8"))
    return report


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["".join(f"<th>{html.escape(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _section(title: str, pictures: Sequence[Path], text: str = "") -> list[str]:
    found = [picture for picture in pictures if picture.is_file()]
    coded = [f"data:image/png;base64,{base64.b64encode(p.read_bytes()).decode()}" for p in found]
    return [
        f"<h2>{html.escape(title)}</h2>",
        text,
        *(f'<img alt="{html.escape(title)}" src="{c}">' for c in coded),
    ]


def _save(figure: Figure, file: Path) -> Path:
    write_atomically(file, lambda partial: figure.savefig(partial, format="png", dpi=100))
    return file


def _confusion(counts: np.ndarray, classes: Sequence[str], file: Path) -> Path:
    """Rows: true classes, as shares of each; columns: predicted classes."""
    side = min(3 + 0.45 * len(classes), 14)
    figure = Figure(figsize=(side, side), layout="constrained")
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    display = ConfusionMatrixDisplay(shares, display_labels=classes)
    display.plot(
        ax=figure.subplots(),
        include_values=len(classes) <= 12,
        xticks_rotation="vertical",
        values_format=".2f",
        cmap="Blues",
        colorbar=False,
    )
    return _save(figure, file)


def _sheet(rows: list[list[Callable[[Axes], None]]], file: Path) -> list[Path]:
    if not rows:
        return []
    figure = Figure(figsize=(2.4 * len(rows[0]), 2.5 * len(rows)), layout="constrained")
    for axes, row in zip(figure.subplots(len(rows), len(rows[0]), squeeze=False), rows, strict=True):
        for axis, draw in zip(axes, row, strict=True):
            axis.axis("off")
            draw(axis)
    return [_save(figure, file)]


def _picture(pixels: np.ndarray, title: str = "", **kwargs: Any) -> Callable[[Axes], None]:
    def draw(axis: Axes) -> None:
        axis.imshow(pixels, **kwargs)
        axis.set_title(title, fontsize=9)

    return draw


def _of_classes(work_dir: Path, results: list[dict]) -> list[str]:
    classes = _classes_of(work_dir)
    truth, found = [Path(r["path"]).parent.name for r in results], [r["label"] for r in results]
    counts = confusion_matrix(truth, found, labels=classes)
    scores = np.stack(precision_recall_fscore_support(truth, found, labels=classes, zero_division=0), 1)
    rows = [(name, *(f"{v:.3f}" for v in row[:3]), str(int(row[3]))) for name, row in zip(classes, scores, strict=True)]
    wrong = sorted((r for r, t in zip(results, truth, strict=True) if r["label"] != t), key=lambda r: -r["confidence"])
    shown = [
        _picture(read_rgb(r["path"]), f"{r['label']} {r['confidence']:.0%}\nis {Path(r['path']).parent.name}")
        for r in wrong[:SHOWN]
    ]
    shown += [lambda axis: None] * (-len(shown) % 4)
    sheet = _sheet([shown[i : i + 4] for i in range(0, len(shown), 4)], work_dir / "mistakes.png")
    table = _table(("class", "precision", "recall", "F1", "images"), rows)
    confusion = _confusion(counts, classes, work_dir / "confusion.png")
    said = f"<p>{len(wrong)} of {len(results)} images are mistaken; first those of which the model is surest.</p>"
    return [*_section("Classes", [confusion], table), *_section("Worst mistakes", sheet, said)]


def _of_maps(work_dir: Path, results: list[dict]) -> list[str]:
    classes = _classes_of(work_dir)
    count = len(classes)
    counts, worst = np.zeros((count, count), np.int64), []
    for result in results:
        truth = read_labels(work_dir / "data" / "maps" / "val" / f"{Path(result['path']).stem}.png")
        found = read_labels(result["labels"])
        known = truth < count
        here = np.bincount(count * truth[known].astype(int) + found[known], minlength=count**2).reshape(count, count)
        counts += here
        worst.append((np.trace(here) / max(here.sum(), 1), result, truth, found))
    union = counts.sum(0) + counts.sum(1) - np.diag(counts)
    rows = [
        (name, f"{counts[i, i] / max(union[i], 1):.3f}", f"{counts[i, i] / max(counts[i].sum(), 1):.3f}", f"{s:.1%}")
        for i, (name, s) in enumerate(zip(classes, counts.sum(1) / max(counts.sum(), 1), strict=True))
    ]
    worst.sort(key=lambda item: item[0])
    scale = dict(vmin=0, vmax=max(count - 1, 1), cmap="tab20", interpolation="nearest")
    sheet = _sheet(
        [
            [
                _picture(read_rgb(result["path"]), f"{right:.0%} of the pixels"),
                _picture(np.where(truth < count, truth, 0), "truth", **scale),
                _picture(found, "predicted", **scale),
            ]
            for right, result, truth, found in worst[:6]
        ],
        work_dir / "mistakes.png",
    )
    table = _table(("class", "IoU", "recall", "share"), rows)
    confusion = _confusion(counts, classes, work_dir / "confusion.png")
    return [*_section("Classes", [confusion], table), *_section("Worst images", sheet)]


def _classes_of(work_dir: Path) -> list[str]:
    return json.loads((work_dir / "data" / "classes.json").read_text())


def _of_objects(work_dir: Path, results: list[dict]) -> list[str]:
    found = [entry["label"] for result in results for entry in result["objects"]]
    rows = [(name, str(found.count(name))) for name in _classes_of(work_dir)]
    table = _table(("class", "objects found"), rows)
    return _section("Objects", [work_dir / "predictions" / "predictions.png"], table)


def _of_images(work_dir: Path, results: list[dict]) -> list[str]:
    return _section("Restored images", [work_dir / "predictions" / "predictions.png"])
