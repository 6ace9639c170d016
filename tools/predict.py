"""Predict with a trained model: `python tools/predict.py CONFIG CHECKPOINT INPUT --out DIR`.

INPUT is an image or a folder of images. For occupancy: voxels (.bin). For next-frame prediction: clips (.npy). For clip
segmentation and frame interpolation: a video or a folder of frames.
"""

import json
from pathlib import Path

import torch
from mmengine.device import get_device

from linzoo.tools.engine.cli import command, config_parser
from linzoo.tools.engine.config import load_config, task_of
from linzoo.tools.engine.errors import InputError
from linzoo.tools.engine.files import write_atomically
from linzoo.tools.engine.task import TASKS, Job, build, draw_sheet
from linzoo.tools.engine.weights import load_weights


@command
def main(argv: list[str] | None = None) -> None:
    """Command line of `predict`: writes predictions.json, a contact sheet predictions.png, and files to DIR."""
    parser = config_parser(__doc__)
    parser.add_argument(
        "checkpoint", help=".safetensors, a checkpoint of any trainer, or a model's name for its published weights"
    )
    parser.add_argument("input", nargs="?", help="file, or folder of files; leave out if the task needs none")
    parser.add_argument("--out", required=True, help="folder for predictions.json, predictions.png and files")
    for task in TASKS:
        task.options(parser.add_argument_group(f"{task.__name__} alone"))
    args = parser.parse_args(argv)

    cfg, out = load_config(args.config, args.cfg_options), Path(args.out)
    task = task_of(cfg)
    model = build(cfg)
    classes = load_weights(task.weights(model), args.checkpoint, simulated=True)
    model.to(get_device()).eval()
    folder = Path(args.input or ".")
    folder = folder if folder.is_dir() else folder.parent
    found = task.find(args.input)
    inputs = [path for path in found if not path.resolve().is_relative_to(out.resolve())]
    if found and not inputs:
        raise InputError(f"--out {args.out!r} holds all of {args.input!r}; expected another folder")
    job = Job(cfg, task, classes, inputs, folder, out, args)
    with torch.inference_mode():
        results = task.predict_files(model, job)
    write_atomically(out / "predictions.json", lambda partial: partial.write_text(json.dumps(results, indent=1)))
    draw_sheet(results, out / "predictions.png", task.draw)
    print(out / "predictions.json")
    print(out / "predictions.png")


if __name__ == "__main__":
    main()
