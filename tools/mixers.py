"""Token mixers side by side: plain ViTs that differ only in their mixer.

For every `plain_<mixer>_t`: parameters and MACs at 224 px, images per second at several sizes, and how time grows with
the tokens, all timed in turns in one run. It also trains a version of two blocks of each, with the same steps and seed,
and prints its accuracy on held-out handwritten digits (`cls/plain_digits`). An interrupted training continues.
"""

import argparse
from pathlib import Path

import rich.box
import rich.console
import rich.table

from linzoo.backbones.plain import MIXERS
from linzoo.tools import benchmark
from linzoo.tools.configs import shipped_configs
from linzoo.tools.state_tuning import run

WORK_DIR = Path("work_dirs/mixers")


def main(argv: list[str] | None = None) -> None:
    """Command line of `mixers`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", nargs="+", choices=MIXERS, default=list(MIXERS), metavar="MIXER", help="only these")
    parser.add_argument("--sizes", nargs="+", type=int, default=[224, 448, 896], help="sides of the images, in px")
    parser.add_argument("--budget", type=float, default=3.0, help="seconds per timing")
    parser.add_argument("--no-training", action="store_true", help="skip the training on digits")
    args = parser.parse_args(argv)

    config, found = str(shipped_configs()["cls/plain_digits"]), {}
    for mixer in () if args.no_training else args.mixers:
        found[mixer] = run(config, WORK_DIR / mixer, "--cfg-options", f"model.model_name=plain_{mixer}_t")
    names = {f"plain_{mixer}_t": mixer for mixer in args.mixers}
    options = ["models", "--models", *names, "--sizes", *map(str, args.sizes), "--batch", "1"]
    options = benchmark.parse([*options, "--budget", str(args.budget)])
    rows = [row for size in args.sizes for row in benchmark.model_rows(list(names), size, options)]

    columns = ["mixer", "params M", "GMACs", *(f"images/s at {size}" for size in args.sizes)]
    columns += ["time ~ tokens^"] * (len(args.sizes) > 1) + ["digits %", "CPU s"] * bool(found)
    table = rich.table.Table(*columns, box=rich.box.MARKDOWN)
    for name, mixer in names.items():
        own = [row for row in rows if row["model"] == name]
        cells = [mixer, f"{own[0]['params'] / 1e6:.2f}", f"{own[0]['macs'] / 1e9:.2f}"]
        cells += [f"{row['images_per_s']:.1f}" for row in own]
        if len(own) > 1:
            cells.append(f"{benchmark.exponent([r['tokens'] for r in own], [r['seconds'] for r in own]):.2f}")
        if found:
            accuracy, seconds = found[mixer]
            cells += [f"{accuracy:.2f}", "-" if seconds is None else f"{seconds:.0f}"]
        table.add_row(*cells)
    facts = benchmark.environment(options.device)
    print("  ".join(f"{key} {value}" for key, value in facts.items()))
    rich.console.Console(highlight=False, width=120).print(table)


if __name__ == "__main__":
    main()
