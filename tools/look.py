"""Look into a trained model: `linzoo look MODEL [WEIGHTS] --what dynamics`.

MODEL and WEIGHTS are those of `linzoo export`: a model's name, `local-dir:DIR` of a run's export, or a config of ours
with its checkpoint.

dynamics: of each selective scan the signs of the eigenvalues of S_C^T S_B, by their real parts. Where all are negative,
tokens of a deep model collapse to 0; where one is positive, they diverge, which serves a model better
(arXiv 2410.03292). `linzoo.backbones.layers.definite_projection` makes all of them positive.
"""

import argparse
import json
import sys
from collections.abc import Callable
from typing import NamedTuple

import rich.box
import rich.console
import rich.table
from torch import nn

from linzoo.backbones.layers.dynamics import scans_of, state_eigenvalues
from linzoo.tools.engine.cli import command
from linzoo.tools.engine.errors import InputError
from linzoo.tools.export import load


class View(NamedTuple):
    """What one look finds: rows of equal keys, and a line that sums them up."""

    rows: list[dict]
    summary: str


def dynamics(model: nn.Module) -> View:
    """The signs of the eigenvalues of each scan's S_C^T S_B."""
    rows = []
    for name, layer in scans_of(model).items():
        for group, values in enumerate(state_eigenvalues(layer)):
            real = values.real
            kind = "convergent" if (real < 0).all() else "divergent"
            signs = {"positive": int((real > 0).sum()), "negative": int((real < 0).sum())}
            ends = {"smallest": real.min().item(), "largest": real.max().item()}
            rows.append({"layer": name, "scan": group, **signs, **ends, "scenario": kind})
    positive, negative = (sum(row[sign] for row in rows) for sign in ("positive", "negative"))
    convergent = sum(row["scenario"] == "convergent" for row in rows)
    return View(
        rows, f"{positive} positive and {negative} negative eigenvalues; {convergent} of {len(rows)} scans converge"
    )


# What there is to see: a function of a model, which raises ValueError where the model has none of it.
LOOKS: dict[str, Callable[[nn.Module], View]] = {"dynamics": dynamics}


@command
def main(argv: list[str] | None = None) -> None:
    """Command line of `look`. Wrong input ends it with one line on stderr and status 2."""
    parser = argparse.ArgumentParser(
        prog="linzoo look", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("weights", metavar="WEIGHTS", nargs="?", help="a file of weights of any trainer")
    parser.add_argument("--what", choices=LOOKS, required=True)
    parser.add_argument("--json", action="store_true", help="one line of JSON in place of the table")
    args = parser.parse_args(argv)
    model, _ = load(args.model, args.weights)
    try:
        rows, summary = LOOKS[args.what](model)
    except ValueError as e:  # the model has none of what is looked for
        raise InputError(f"--what {args.what}: {e}") from e
    if args.json:
        print(json.dumps(rows))
        return
    table = rich.table.Table(box=rich.box.SIMPLE)
    for key, value in rows[0].items():
        table.add_column(key, justify="left" if isinstance(value, str) else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    width = None if sys.stdout.isatty() else 160
    rich.console.Console(highlight=False, width=width).print(table)
    print(summary)


if __name__ == "__main__":
    main()
