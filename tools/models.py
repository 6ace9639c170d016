#!/usr/bin/env python
"""Lists the zoo: the measured cost of each model, beside the figures that its authors publish.

MACs are measured by running the model on the meta device under `torch.utils.flop_counter`. Convolutions and matrix
products count one MAC per multiply-add. Our operators count by their registered formula, as the papers count them (a
selective scan of L tokens, D channels and N states: 9 L D N, and L D for the skip). Elementwise operations and
normalisations count nothing.
"""

import argparse
import csv
import functools
import importlib.resources
import json
import sys
from pathlib import Path

import timm
import torch
from rich.console import Console
from rich.table import Table
from timm.models import get_pretrained_cfg, get_pretrained_cfg_value, model_entrypoint
from torch.utils.flop_counter import FlopCounterMode

from linzoo.backbones import KINDS, kind_of, list_models
from linzoo.backbones.layers.without_memory import without_memory
from linzoo.backbones.published import PUBLISHED, Published

VOLUME = 64  # side of the cubes that volume models are measured on
COLUMNS = (
    "name", "family", "params_m", "gmacs", "size", "published_params_m", "published_gmacs", "top1", "paper", "weights",
    "license", "source", "note",
)  # fmt: skip


def family_of(name: str) -> str:
    """The family of a registered model: its file in `linzoo.backbones`, or in timm."""
    return model_entrypoint(name).__module__.rpartition(".")[2]


def create(name: str, size: int, **kwargs) -> torch.nn.Module:
    """`timm.create_model` for square images of `size`, even if the architecture fixes its input size."""
    if get_pretrained_cfg_value(name, "fixed_input_size"):
        kwargs["img_size"] = size
    return timm.create_model(name, **kwargs)


@functools.cache
def measure(name: str, size: int = 224) -> tuple[int, float | None]:
    """Parameters and multiply-accumulates for one image of `size` x `size`.

    Video models: a clip of the model's number of frames, if it has one, else one frame. Volumes: a cube. Forecasting: a
    series of seven variates. Image generators: one forward pass at their own size.

    MACs are None if they depend on the scene, as for occupancy models.
    """
    with without_memory():
        model, kind = create(name, size).eval(), kind_of(name)
    parameters = sum(p.numel() for p in model.parameters())
    if kind == "occupancy":
        return parameters, None
    channels = getattr(model, "in_chans", 1)
    one = (1, channels)
    depth = {"video": one, "tracking": one, "volume": (channels, size)}.get(kind, (channels,))
    shape = (1, *depth, size, size)
    if kind == "forecasting":
        shape = (1, 7, model.context)
    if hasattr(model, "num_frames"):
        shape = (1, channels, model.num_frames, size, size)
    inputs = [torch.empty(shape, device="meta")] * (2 if kind == "interpolation" else 1)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(*getattr(model, "dummy_inputs", inputs))  # the name comes from diffusers
    counts = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    macs = sum(count if op.startswith("linzoo") else count / 2 for op, count in counts.items())
    return parameters, macs


def describe(name: str) -> dict:
    """One row of the list, with `COLUMNS` as keys; None if there is no figure."""
    cfg = get_pretrained_cfg(name)
    published = PUBLISHED.get(name, Published(None, None, None, "", (cfg.input_size or (VOLUME,))[-1]))
    params, macs = measure(name, published.size)
    papers = cfg.paper_ids or ()
    return {
        "name": name,
        "family": family_of(name),
        "params_m": round(params / 1e6, 2),
        "gmacs": None if macs is None else round(macs / 1e9, 2),
        "size": published.size,
        "published_params_m": published.params_m,
        "published_gmacs": published.gmacs,
        "top1": published.top1,
        "paper": papers if isinstance(papers, str) else " ".join(papers),
        "weights": "yes" if cfg.url or cfg.hf_hub_id or cfg.source else "no",
        "license": cfg.license or "-",
        "source": published.source,
        "note": published.note,
    }


def speeds(file: Path) -> tuple[dict[str, float], str]:
    """Images per second of models at 224 pixels, written by ``tools/benchmark.py models --json FILE``, and the machine.

    Raises:
        ValueError: the file has no such table.
    """
    try:
        [table] = [table for table in json.loads(file.read_text()) if table["title"] == "models"]
        rows, facts = table["rows"], table["environment"]
        found = {row["model"]: round(row["images_per_s"], 1) for row in rows if row["size"] == 224}
        machine = facts.get("gpu") or f"{facts['threads']} threads of {facts['cpu']}"
        return found, f"Images a second at 224 pixels: {machine}, {facts['dtype']}, {facts['batch']} images at once."
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError("expected what `python tools/benchmark.py models --json FILE` writes") from e


def write_page(rows: list[dict], file: Path, images_per_s: dict[str, float], machine: str) -> None:
    """Write `rows` of `describe` as an offline page: a chart of top-1 against costs, filters, a table."""
    rows = [{**row, "kind": kind_of(row["name"]), "images_per_s": images_per_s.get(row["name"])} for row in rows]
    data = json.dumps({"rows": rows, "machine": machine}).replace("<", "\\u003c")
    page = importlib.resources.files("linzoo.tools").joinpath("models.html").read_text(encoding="utf-8")
    part = file.with_name(f".{file.name}.part")
    part.write_text(page.replace("DATA", data, 1), encoding="utf-8")
    part.replace(file)


def print_table(rows: list[dict]) -> None:
    """The rows as a table on the terminal, with published figures in brackets beside ours."""
    table = Table(caption="in brackets: as published; parameters in millions, MACs in 10^9 of one image of px x px")
    for title in ("model", "family", "params", "MACs", "px", "top-1", "paper", "weights", "licence", "note"):
        table.add_column(
            title, justify="right" if title in ("params", "MACs", "px", "top-1") else "left", no_wrap=title == "model"
        )

    def beside(ours, theirs):
        ours = "" if ours is None else ours
        return f"{ours}" if theirs is None else f"{ours} ({theirs})"

    for r in rows:
        costs = [beside(r[c], r[f"published_{c}"]) for c in ("params_m", "gmacs")]
        rest = (r[c] for c in ("size", "top1", "paper", "weights", "license", "note"))
        table.add_row(r["name"], r["family"], *costs, *("" if value is None else str(value) for value in rest))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("filters", nargs="*", metavar="filter", help="wildcards for model names, like 'groupmamba*'")
    parser.add_argument("--csv", action="store_true", help="comma-separated values instead of a table")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with a chart to FILE instead")
    parser.add_argument(
        "--benchmark", type=Path, metavar="JSON", help="with --html: speeds from `tools/benchmark.py models`"
    )
    args = parser.parse_args(argv)
    names = []
    for pattern in args.filters or ["*"]:
        found = [name for kind in KINDS for name in list_models(pattern, kind)]
        if not found:
            parser.error(f"no model of the zoo matches {pattern!r}")
        names += [name for name in found if name not in names]
    if args.benchmark and not args.html:
        parser.error("--benchmark adds to the page of --html FILE, which is not given")
    if args.html and not args.html.parent.is_dir():
        parser.error(f"--html {str(args.html)!r}: no such folder")
    try:
        images_per_s, machine = speeds(args.benchmark) if args.benchmark else ({}, "")
    except (OSError, ValueError) as e:
        parser.error(f"--benchmark {str(args.benchmark)!r}: {e}")
    rows = [describe(name) for name in names]
    if args.html:
        write_page(rows, args.html, images_per_s, machine)
        return
    if not args.csv:
        print_table(rows)
        return
    writer = csv.DictWriter(sys.stdout, COLUMNS)
    writer.writeheader()
    writer.writerows(rows)


if __name__ == "__main__":
    main()
