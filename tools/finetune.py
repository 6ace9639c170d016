"""Fine-tune a model on a folder of your own: `linzoo finetune MODEL DATA --work-dir DIR`.

DATA depends on the task. Classification: one folder of images per class, or a CSV file; for large sets wds/FOLDER
(WebDataset, train*.tar and val*.tar) or hfds/NAME-OR-FOLDER (Hugging Face). Segmentation: images/ and masks/.
Detection: COCO annotations. Restoration: input/ and target/. Each may be split into train/ and val/, or not.

Written to the work dir: config.py, to continue by hand with `linzoo train`; checkpoints; curves.png; and report.html,
which contains all its pictures.
"""

import argparse
import contextlib
import importlib.resources
import io
import json
import math
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import timm
from mmengine.config import Config
from timm.data import resolve_data_config

from linzoo.backbones import kind_of, list_models
from linzoo.backbones.checkpoints import load_plain
from linzoo.backbones.layers.adapters import ADAPTERS
from linzoo.backbones.layers.without_memory import without_memory
from linzoo.tools import predict, test, train
from linzoo.tools.engine import LinZooBackbone
from linzoo.tools.engine.cli import command
from linzoo.tools.engine.errors import InputError, did_you_mean, existing_file, note
from linzoo.tools.engine.files import write_atomically
from linzoo.tools.engine.layouts import TASK_NAMES, Arranged, arrange, find_task
from linzoo.tools.engine.report import write_report
from linzoo.tools.engine.shards import find_sets

BASES = Path(str(importlib.resources.files("linzoo"))) / "configs" / "_base_"
KINDS = {
    "cls": ("backbone", "adopted", None),
    "seg": ("backbone", "adopted", "pyramid", None),
    "det": ("backbone", "adopted", "pyramid", None),
    "restore": ("restoration",),
}
BEST = {"cls": "accuracy/top1", "seg": "mIoU", "det": "coco/bbox_mAP", "restore": "restore/PSNR"}
COLOURS = [[120, 120, 120], [230, 25, 75], [60, 180, 75], [0, 130, 200], [245, 130, 48], [145, 30, 180], [70, 240, 240]]


class Recipe(NamedTuple):
    """How long to train, and how strongly to augment the images, for a range of data set sizes."""

    epochs: int
    smallest_crop: float  # share of the image's area


# By the largest number of training images. A small set is seen more often, and augmented less.
RECIPES = {500: Recipe(30, 0.5), 5_000: Recipe(20, 0.35), 50_000: Recipe(15, 0.2), 10**12: Recipe(10, 0.08)}


def _size(arranged: Arranged, asked: int | None, largest: int) -> int:
    """Side to train at: a multiple of 32, by default that of the images, up to `largest`."""
    if asked is not None and (asked < 32 or asked % 32):
        raise InputError(f"--size {asked}: expected a multiple of 32")
    return asked or min(max(arranged.side // 32 * 32, 64), largest)


def _loaders(batch: int, val_batch: int, workers: int, train_set: dict, val_set: dict, **kwargs: Any) -> dict[str, Any]:
    def loader(size: int, shuffle: bool, dataset: dict) -> dict:
        sampler = dict(type="DefaultSampler", shuffle=shuffle)
        return dict(
            batch_size=size,
            num_workers=workers,
            persistent_workers=workers > 0,
            sampler=sampler,
            dataset=dataset,
            **kwargs,
        )

    # drop_last: BatchNorm has no statistics for a last batch of one image.
    return dict(
        train_dataloader=loader(batch, True, train_set) | dict(drop_last=True),
        val_dataloader=loader(val_batch, False, val_set),
    )


def _schedule(args: argparse.Namespace, lr: float, layer_decay: float, **optimizer: Any) -> dict[str, Any]:
    warm_up = min(max(args.epochs // 10, 1), args.epochs)
    schedule = [dict(type="LinearLR", start_factor=0.01, end=warm_up, convert_to_iter_based=True)]
    if args.epochs > warm_up:
        schedule.append(
            dict(
                type="CosineAnnealingLR",
                eta_min=(args.lr or lr) / 100,
                begin=warm_up,
                end=args.epochs,
                convert_to_iter_based=True,
            )
        )
    return dict(
        train_cfg=dict(by_epoch=True, max_epochs=args.epochs, val_interval=1),
        optim_wrapper=dict(
            constructor="LayerDecay",
            optimizer=dict(type="AdamW", lr=args.lr or lr, weight_decay=0.05, **optimizer),
            paramwise_cfg=dict(layer_decay=layer_decay),
            clip_grad=dict(max_norm=5.0),
        ),
        param_scheduler=schedule,
    )


def _hooks(task: str, steps: int) -> dict[str, Any]:
    best = dict(type="CheckpointHook", interval=1, max_keep_ckpts=2, save_best=BEST[task], rule="greater")
    names = dict(sync_buffers="SyncBuffersHook", resume="ResumeHook", progress="ProgressHook", curves="CurveHook")
    logger = dict(type="LoggerHook", interval=max(min(steps // 2, 50), 1))
    return dict(logger=logger, checkpoint=best, **{key: dict(type=name) for key, name in names.items()})


def _start(args: argparse.Namespace) -> dict[str, Any]:
    """Keywords that start the model from the requested weights."""
    name, given = args.model, args.weights
    if given is None:
        return dict(model_name=name, pretrained=False)
    if given == "published" or not (Path(given).suffix or Path(given).exists()):  # a timm tag
        return dict(model_name=name if given == "published" else f"{name}.{given}", pretrained=True)
    existing_file("--weights", given.partition("#")[0])
    return dict(model_name=name, pretrained=given)


def _mean_and_std(name: str) -> tuple[list[float], list[float]]:
    cfg = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    mean, std = ([round(255 * value, 3) for value in cfg[key]] for key in ("mean", "std"))
    return (mean, std) if len(mean) == 3 else (mean * 3, std * 3)


def _classes(args: argparse.Namespace, arranged: Arranged, data: Path) -> dict[str, Any]:
    recipe, size = args.recipe, _size(arranged, args.size, 224)
    mean, std = _mean_and_std(args.model)
    count, crop = len(arranged.classes), dict(interpolation="bicubic", backend="pillow")
    train_steps = [
        dict(type="LoadImageFromFile"),
        dict(type="RandomResizedCrop", scale=size, crop_ratio_range=(recipe.smallest_crop, 1.0), **crop),
        *([] if args.no_flip else [dict(type="RandomFlip", prob=0.5, direction="horizontal")]),
        dict(type="ColorJitter", brightness=0.2, contrast=0.2, saturation=0.2),
        dict(type="PackInputs"),
    ]
    test_steps = [
        dict(type="LoadImageFromFile"),
        dict(type="ResizeEdge", scale=round(size / 0.95), edge="short", **crop),
        dict(type="CenterCrop", crop_size=size),
        dict(type="PackInputs"),
    ]
    folders = {
        part: dict(type="ImageFolder", data_root=str(data), data_prefix=part, test_mode=part == "val")
        for part in ("train", "val")
    }
    steps = {"train": train_steps, "val": test_steps}
    sets = [dict(found, pipeline=steps[part]) for part, found in (args.sets or folders).items()]
    frozen = [dict(type="FreezeHook")] if args.freeze else []
    anneal = [dict(type="AnnealHook", begin=args.epochs - args.epochs // 4)] if args.weight_bits else []
    extra = dict(img_size=size) if timm.get_pretrained_cfg(args.model).fixed_input_size else {}
    return dict(
        _base_=["runtime.py"],
        default_scope="mmpretrain",
        model=dict(
            type="Classifier",
            num_classes=count,
            loss=dict(type="LabelSmoothLoss", label_smooth_val=0.1, mode="original"),
            **(dict(adapter=dict(kind=args.adapter, rank=args.rank)) if args.adapter else {}),
            **(dict(weight_bits=args.weight_bits) if args.weight_bits else {}),
            **_start(args),
            **extra,
        ),
        data_preprocessor=dict(num_classes=count, mean=mean, std=std, to_rgb=True),
        **_loaders(args.batch, args.batch, args.workers, *sets),
        val_evaluator=dict(type="Accuracy", topk=(1,)),
        val_cfg=dict(),
        default_hooks=_hooks("cls", args.steps) | dict(export=dict(type="ExportHook")),
        custom_hooks=frozen + anneal,
        **_schedule(args, 1e-3, 0.75 if args.weights else 1.0),
    )


def _backbone(args: argparse.Namespace, size: int) -> tuple[dict, LinZooBackbone]:
    """Settings of a backbone, and the backbone, built without memory."""
    kwargs = dict(img_size=size) if timm.get_pretrained_cfg(args.model).fixed_input_size else {}
    settings = dict(type="LinZooBackbone", model_kwargs=kwargs, **_start(args))
    with without_memory():
        made = LinZooBackbone(settings["model_name"], dict(kwargs))
    if args.freeze:
        settings["frozen_stages"] = len(made.channels)
    return settings, made


def _maps(args: argparse.Namespace, arranged: Arranged, data: Path) -> dict[str, Any]:
    size = _size(arranged, args.size, 512)
    flip = [] if args.no_flip else [dict(type="RandomFlip", prob=0.5)]
    mean, std = _mean_and_std(args.model)
    train_steps = [
        dict(type="LoadImageFromFile"),
        dict(type="LoadAnnotations"),
        dict(type="RandomResize", scale=(4 * size, size), ratio_range=(0.75, 1.5), keep_ratio=True),
        dict(type="RandomCrop", crop_size=(size, size), cat_max_ratio=0.9),
        *flip,
        dict(type="PhotoMetricDistortion"),
        dict(type="PackSegInputs"),
    ]
    test_steps = [
        dict(type="LoadImageFromFile"),
        dict(type="Resize", scale=(4 * size, size), keep_ratio=True),
        dict(type="LoadAnnotations"),
        dict(type="PackSegInputs"),
    ]
    palette = [COLOURS[i % len(COLOURS)] for i in range(len(arranged.classes))]
    common = dict(
        type="LabelMaps",
        data_root=str(data),
        metainfo=dict(classes=tuple(arranged.classes), palette=palette),
        img_suffix=arranged.suffix,
        seg_map_suffix=".png",
        reduce_zero_label=False,
    )
    sets = [
        dict(
            data_prefix=dict(img_path=f"images/{part}", seg_map_path=f"maps/{part}"),
            pipeline=steps,
            test_mode=part == "val",
            **common,
        )
        for part, steps in (("train", train_steps), ("val", test_steps))
    ]
    backbone, made = _backbone(args, size)
    head = dict(num_classes=len(arranged.classes), channels=128, dropout_ratio=0.0, init_cfg=None)
    return dict(
        _base_=["upernet.py"],
        model=dict(
            data_preprocessor=dict(mean=mean, std=std, size=(size, size)),
            backbone=backbone,
            decode_head=dict(in_channels=list(made.channels), **head),
            auxiliary_head=dict(in_channels=made.channels[2], **head),
        ),
        **_loaders(args.batch, 1, args.workers, *sets),
        val_evaluator=dict(type="IoUMetric", iou_metrics=["mIoU"]),
        default_hooks=_hooks("seg", args.steps),
        **_schedule(args, 1e-3, 0.75 if args.weights else 1.0),
    )


def _objects(args: argparse.Namespace, arranged: Arranged, data: Path) -> dict[str, Any]:
    size = _size(arranged, args.size, 640)
    masks, count = arranged.masks, len(arranged.classes)
    mean, std = _mean_and_std(args.model)
    flip = [] if args.no_flip else [dict(type="RandomFlip", prob=0.5)]
    resize = dict(type="Resize", scale=(2 * size, size), keep_ratio=True)
    load = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations", with_bbox=True, with_mask=masks)]
    train_steps = [*load, resize, *flip, dict(type="PackDetInputs")]
    meta = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
    test_steps = [load[0], resize, dict(type="PackDetInputs", meta_keys=meta)]
    common = dict(type="CocoImages", data_root=str(data), metainfo=dict(classes=tuple(arranged.classes)))
    sets = [
        dict(
            ann_file=f"{part}.json", data_prefix=dict(img=f"{part}/"), pipeline=steps, test_mode=part == "val", **common
        )
        for part, steps in (("train", train_steps), ("val", test_steps))
    ]
    sets[0]["filter_cfg"] = dict(filter_empty_gt=True)
    backbone, made = _backbone(args, size)
    heads = dict(bbox_head=dict(num_classes=count), **(dict(mask_head=dict(num_classes=count)) if masks else {}))
    metric = ["bbox", "segm"] if masks else ["bbox"]
    return dict(
        _base_=["mask_rcnn.py"] if masks else ["mmdet::_base_/models/faster-rcnn_r50_fpn.py", "runtime_dense.py"],
        default_scope="mmdet",
        model=dict(
            data_preprocessor=dict(mean=mean, std=std),
            backbone=dict(_delete_=True, **backbone) if not masks else backbone,
            neck=dict(in_channels=list(made.channels)),
            roi_head=heads,
        ),
        **_loaders(args.batch, args.batch, args.workers, *sets),
        val_evaluator=dict(type="CocoMetric", metric=metric, ann_file=str(data / "val.json"), classwise=True),
        default_hooks=_hooks("det", args.steps),
        **_schedule(args, 5e-4, 0.75 if args.weights else 1.0),
    )


def _targets(args: argparse.Namespace, arranged: Arranged, data: Path) -> dict[str, Any]:
    size = min(_size(arranged, args.size, 64), arranged.shortest)
    sets = [
        dict(type="PairedImages", data_root=str(data), data_prefix=part, channels=arranged.channels)
        for part in ("train", "val")
    ]
    sets[0]["crop"] = size
    return dict(
        _base_=["restore.py"],
        model=dict(type="Restorer", loss="charbonnier", in_chans=arranged.channels, **_start(args)),
        **_loaders(args.batch, 1, args.workers, *sets, collate_fn=dict(type="default_collate")),
        default_hooks=_hooks("restore", args.steps) | dict(export=dict(type="ExportHook")),
        **_schedule(args, 5e-4, 1.0),
    )


SETTINGS = {"cls": _classes, "seg": _maps, "det": _objects, "restore": _targets}


def _check_model(name: str, task: str) -> None:
    base = name.partition(".")[0]
    if not timm.is_model(base):
        raise InputError(f"MODEL {name!r}: no such model in timm or LinZoo{did_you_mean(base, timm.list_models())}")
    kind = kind_of(base)
    if kind not in KINDS[task]:
        known = list_models(kind=KINDS[task][0])[0]  # type: ignore[arg-type]
        raise InputError(f"MODEL {name!r} is of kind {kind!r}, which --task {task} does not train; try {known!r}")


def make_config(args: argparse.Namespace, arranged: Arranged, data: Path) -> Config:
    """The complete training config of a data set; nothing is left to look up."""
    settings = SETTINGS[args.task](args, arranged, data)
    bases = [base if "::" in base else str(BASES / base) for base in settings.pop("_base_")]
    lines = [f"_base_ = {bases!r}", *(f"{key} = {value!r}" for key, value in settings.items())]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "config.py")
        file.write_text("\n".join(lines))
        cfg = Config.fromfile(file)
    if args.weights and Path(args.weights).is_file() and "pruning" in load_plain(args.weights):
        note(f"--weights {args.weights!r} is pruned: its zeros stay")
        keep = dict(type="SparseHook", checkpoint=str(Path(args.weights).resolve()))
        cfg.custom_hooks = [*cfg.get("custom_hooks", []), keep]
    cfg.test_dataloader, cfg.test_evaluator = cfg.val_dataloader, cfg.val_evaluator
    cfg.test_cfg = cfg.get("test_cfg", {})
    return cfg


def best_weights(work_dir: Path) -> Path:
    """The weights of a run's best validation; the last checkpoint if there is no best one."""
    for pattern in ("export/model.safetensors", "best_*.pth", "epoch_*.pth"):
        if found := sorted(work_dir.glob(pattern), key=lambda file: file.stat().st_mtime):
            return found[-1]
    raise InputError(f"--work-dir {str(work_dir)!r} holds no checkpoint; expected a finished run")


def _said(main: Any, argv: list[str]) -> str:
    """Runs a tool and returns what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        main(argv)
    return out.getvalue()


@command
def main(argv: list[str] | None = None) -> None:
    """Command line of `finetune`. Wrong input ends with one line on stderr and status 2."""
    parser = argparse.ArgumentParser(
        prog="linzoo finetune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="a model of `linzoo models` or of timm")
    parser.add_argument("data", metavar="DATA", help="file or folder")
    parser.add_argument("--task", choices=TASK_NAMES, help="default: inferred from the layout of DATA")
    parser.add_argument("--work-dir", help="default: work_dirs/finetune_MODEL")
    parser.add_argument("--weights", help="a weights file of any trainer, a timm tag, or 'published'")
    parser.add_argument(
        "--classes", help="class names of the label maps, A,B,...; default: those listed in DATA/classes.txt"
    )
    parser.add_argument("--epochs", type=int, help="default: 30 to 10, fewer for more images")
    parser.add_argument("--size", type=int, help="image side in pixels; default: that of DATA, up to a limit")
    parser.add_argument("--batch", type=int, help="images per step; default: 16 for classification, else 4")
    parser.add_argument("--lr", type=float, help="learning rate of the last layers")
    parser.add_argument("--workers", type=int, default=1, help="processes that read images")
    parser.add_argument("--freeze", action="store_true", help="train only the head")
    parser.add_argument("--adapter", choices=ADAPTERS, help="train only the head and low-rank adapters of projections")
    parser.add_argument("--rank", type=int, default=4, help="rank of --adapter; default: 4")
    parser.add_argument(
        "--weight-bits", type=int, help="train and export with projections rounded to this many bits, 2 to 8 (OFQ)"
    )
    parser.add_argument("--no-flip", action="store_true", help="do not mirror images, for data like letters")
    parser.add_argument("--resume", action="store_true", help="continue the run in the work dir")
    args = parser.parse_args(argv)
    stream = args.data.startswith(("wds/", "hfds/"))
    data, work_dir = Path(args.data), Path(args.work_dir or f"work_dirs/finetune_{args.model}")
    config = work_dir / "config.py"
    for name, least in (("epochs", 1), ("batch", 1), ("lr", 1e-12), ("workers", 0), ("rank", 1)):
        value = getattr(args, name)
        if value is not None and not (value >= least and math.isfinite(value)):
            raise InputError(f"--{name} {value}: expected {'a positive number' if least else '0 or more'}")
    args.task = args.task or ("cls" if stream else find_task(data))
    if stream and args.task != "cls":
        raise InputError(f"DATA {args.data!r} is for --task cls alone, and --task is {args.task!r}")
    _check_model(args.model, args.task)
    if args.freeze and args.weights is None:
        note("--freeze without --weights: the head learns from random features")
    chosen = {"adapter": args.adapter, "weight-bits": args.weight_bits, "freeze": args.freeze}
    chosen = [f"--{name} {value}" for name, value in chosen.items() if value]
    if len(chosen) > 1:
        raise InputError(f"{' and '.join(chosen)}: expected one of them")
    if chosen and not args.freeze and args.task != "cls":
        raise InputError(f"{chosen[0]} with --task {args.task}: expected --task cls")
    if args.weight_bits is not None and not 2 <= args.weight_bits <= 8:
        raise InputError(f"--weight-bits {args.weight_bits}: expected 2 to 8")
    if args.adapter and args.weights is None:
        raise InputError(f"--adapter {args.adapter} without --weights: expected weights to adapt")
    if config.exists() and not args.resume:
        raise InputError(f"--work-dir {str(work_dir)!r} holds a run; --resume continues it, or choose another folder")
    if not config.exists():
        names, args.sets = args.classes.split(",") if args.classes else None, None
        if stream:
            arranged, args.sets = find_sets(args.data, names, args.workers)
        else:
            arranged = arrange(data, args.task, work_dir / "data", names)
        counts = arranged.counts
        args.recipe = next(recipe for most, recipe in RECIPES.items() if counts["train"] <= most)
        args.epochs = args.epochs or args.recipe.epochs
        args.batch = min(args.batch or (16 if args.task == "cls" else 4), max(counts["train"] // 2, 1))
        args.steps = max(counts["train"] // args.batch, 1)
        cfg = make_config(args, arranged, (work_dir / "data").resolve())
        write_atomically(config, lambda partial: partial.write_text(cfg.pretty_text))
        named = f"{len(arranged.classes)} classes ({', '.join(arranged.classes[:6])}), " if arranged.classes else ""
        images = f"{counts['train']} images to train on, {counts['val']} to validate on"
        note(f"{args.task}: {named}{images}, {args.epochs} epochs")
    train.main([str(config), "--work-dir", str(work_dir), "--resume"])
    weights = best_weights(work_dir)
    metrics = json.loads(_said(test.main, [str(config), str(weights)]).strip().splitlines()[-1])
    results = None
    if not stream:  # a stream has no image files
        inputs = {"cls": "val", "seg": "images/val", "det": "val", "restore": "val/input"}[args.task]
        out = work_dir / "predictions"
        _said(predict.main, [str(config), str(weights), str(work_dir / "data" / inputs), "--out", str(out)])
        results = json.loads((out / "predictions.json").read_text())
    report = write_report(work_dir, args.task, args.model, metrics, results)
    for name, value in metrics.items():
        print(f"{name + ':':24} {value:.4g}")
    print(f"weights:                 {weights}")
    print(f"config:                  {config}")
    print(f"report:                  {report}")


if __name__ == "__main__":
    main()
