"""Segment digits on photographs, or detect them, starting from the quickstart's classifier: `make segmentation`."""

import argparse
import json
from pathlib import Path

from linzoo.tools import predict, quickstart, train

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
TASKS = {
    "segmentation": ("seg/upernet_groupmamba_t_scenes.py", {"mIoU": "mIoU (%)"}),
    "detection": (
        "det/mask-rcnn_groupmamba_t_scenes.py",
        {"coco/bbox_mAP_50": "AP50 of boxes", "coco/segm_mAP_50": "AP50 of masks"},
    ),
}
CLASSIFIER = Path("work_dirs/quickstart/export/model.safetensors")


def best(work_dir: Path, metric: str) -> tuple[Path, dict[str, float]]:
    """The checkpoint of a run's best validation by `metric`, and that validation's metrics."""
    history = [json.loads(line) for log in work_dir.glob("*/vis_data/scalars.json") for line in log.open()]
    scores = max((entry for entry in history if metric in entry), key=lambda entry: entry[metric])
    [checkpoint] = work_dir.glob(f"best_{metric.replace('/', '_')}_*.pth")
    return checkpoint, scores


def main(argv: list[str] | None = None) -> None:
    """Command line of `scenes`. An interrupted run continues; a finished one only predicts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--no-comparison", action="store_true", help="skip the same run from random weights")
    args = parser.parse_args(argv)
    if not CLASSIFIER.exists():
        quickstart.main([])
    name, shown = TASKS[args.task]
    config, results = str(CONFIGS / name), {}
    starts = {"the classifier's weights": [], "random weights": ["--cfg-options", "model.backbone.pretrained=False"]}
    if args.no_comparison:
        del starts["random weights"]
    for start, options in starts.items():
        work_dir = Path("work_dirs", args.task if not options else f"{args.task}_from_random")
        train.main([config, "--work-dir", str(work_dir), "--resume", *options])
        results[start] = best(work_dir, next(iter(shown)))
    out = Path("work_dirs", args.task, "predictions")
    images = "data/scenes/images/validation"
    predict.main([config, str(results["the classifier's weights"][0]), images, "--out", str(out)])
    for start, (_, scores) in results.items():
        print(f"from {start + ':':26s} " + "  ".join(f"{label} {scores[key]:.3f}" for key, label in shown.items()))
    print(f"picture:   {out / 'predictions.png'}")
    print(f"Remove work_dirs/{args.task}* to train again.")


if __name__ == "__main__":
    main()
