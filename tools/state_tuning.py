"""Tune the states of a trained Vision-RWKV-6, and compare that with a linear probe and with full fine-tuning.

Trains a model of four blocks on the handwritten digits 0 to 4, then starts three runs from these weights on the digits
5 to 9. Prints accuracy, the number of trained values, seconds of processor time, and the size of the file that holds
these values.
"""

import argparse
import json
import time
from pathlib import Path

import rich.box
import rich.console
import rich.table
import torch

from linzoo.tools import train
from linzoo.tools.configs import shipped_configs
from linzoo.tools.engine.config import load_config
from linzoo.tools.engine.task import build

WORK_DIR = Path("work_dirs/state_tuning")
RUNS = {"linear probe": "probe", "state tuning": "states", "all weights": "full"}


def learning(config: str) -> int:
    """Number of trainable values under a config."""
    cfg = load_config(config)
    model = build(cfg).get_submodule("model")
    if any(hook.type == "FreezeHook" for hook in cfg.get("custom_hooks", ())):
        model = model.get_classifier()
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def run(config: str, work_dir: Path, *options: str) -> tuple[float, float | None]:
    """Train, or continue, in a work dir: top-1 accuracy in percent; processor seconds, unless it was interrupted."""
    file, begun = work_dir / "seconds.json", any(work_dir.glob("*.pth"))
    start = time.process_time()
    train.main([config, "--work-dir", str(work_dir), "--resume", *options])
    if not begun:
        file.write_text(json.dumps(time.process_time() - start))
    seconds = json.loads(file.read_text()) if file.exists() else None
    return json.loads((work_dir / "export/config.json").read_text())["top1"], seconds


def main(argv: list[str] | None = None) -> None:
    """Command line of `state_tuning`. An interrupted run continues; finished ones only print the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    configs = shipped_configs()
    top1, _ = run(str(configs["cls/vrwkv6_t_digits"]), WORK_DIR / "low_digits")
    table = rich.table.Table("", "accuracy, %", "numbers that learn", "CPU seconds", "file, KiB", box=rich.box.SIMPLE)
    for name, ending in RUNS.items():
        config, work_dir = str(configs[f"cls/vrwkv6_t_digits_{ending}"]), WORK_DIR / ending
        accuracy, seconds = run(config, work_dir)
        states = work_dir / "export/states.safetensors"
        size = (states if states.exists() else work_dir / "export/model.safetensors").stat().st_size
        said = "-" if seconds is None else f"{seconds:.0f}"
        table.add_row(name, f"{accuracy:.2f}", f"{learning(config):,}", said, f"{size / 1024:.0f}")
    print(f"digits 0 to 4: {top1:.2f} % of 180 held-out ones; threads: {torch.get_num_threads()}")
    print("digits 5 to 9, from these weights, of 180 held-out ones:")
    rich.console.Console(highlight=False).print(table)
    print(f"states: {WORK_DIR / 'states/export/states.safetensors'}")
    print(f"Remove {WORK_DIR} to train again.")


if __name__ == "__main__":
    main()
