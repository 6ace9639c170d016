"""What mmseg's segmenters and mmdet's detectors find in images, written and drawn."""

from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import DATASETS, VISUALIZERS, DefaultScope
from PIL import Image

from .runner import write_atomically

VISUALIZER = {"mmseg": "SegLocalVisualizer", "mmdet": "DetLocalVisualizer"}


def predict_dense(
    cfg: Config, model: torch.nn.Module, images: list[Path], folder: Path, out: Path, threshold: float
) -> list[dict]:
    """Segment images or detect objects in them; write what is found and pictures of it, placed as below `folder`.

    Args:
        cfg: training config of mmseg or mmdet; its test pipeline prepares the images.
        model: the model with its weights, in eval mode.
        images: paths.
        folder: what the images' places are relative to.
        out: label maps (indices of classes) go to `out/labels`, pictures to `out/drawn`, both as PNG files.
        threshold: the score under which an object is left out.

    Returns:
        for each image its path and that of its picture; of a segmented one the label map and each class's share of the
        pixels; of the others the objects with label, score, box (x1, y1, x2, y2 in pixels) and area of the mask, if
        the model finds masks, in pixels.
    """
    scope = cfg.default_scope
    with DefaultScope.overwrite_default_scope(scope):
        steps = [step for step in cfg.test_dataloader.dataset.pipeline if step.type != "LoadAnnotations"]
        pipeline = Compose(steps)
        visualizer = VISUALIZERS.build(dict(type=VISUALIZER[scope], name=str(out)))
        dataset = DATASETS.get(f"{scope}.{cfg.test_dataloader.dataset.type}")
        visualizer.dataset_meta = {**dataset.METAINFO, **cfg.test_dataloader.dataset.get("metainfo", {})}
        classes, results = visualizer.dataset_meta["classes"], []
        for path in images:
            with torch.inference_mode():
                [sample] = model.test_step(pseudo_collate([pipeline({"img_path": str(path), "img_id": 0})]))
            sample = sample.cpu()
            result = {"path": str(path), "drawn": str(_place(out / "drawn", path, folder))}
            if scope == "mmseg":
                labels = sample.pred_sem_seg.data[0].numpy().astype(np.uint8)
                result["labels"] = str(_place(out / "labels", path, folder))
                _save(labels, result["labels"])
                shares = np.bincount(labels.ravel(), minlength=len(classes)) / labels.size
                result["shares"] = {name: float(share) for name, share in zip(classes, shares, strict=True) if share}
            else:
                found = sample.pred_instances
                sample.pred_instances = found = found[found.scores >= threshold]
                areas = found.masks.flatten(1).sum(1).tolist() if "masks" in found else [None] * len(found)
                result["objects"] = [
                    dict(label=classes[label], score=score, box=box, **({} if area is None else {"area": area}))
                    for label, score, box, area in zip(
                        found.labels.tolist(), found.scores.tolist(), found.bboxes.tolist(), areas, strict=True
                    )
                ]
            _draw(visualizer, path, sample, result["drawn"], threshold)
            results.append(result)
    return results


def _draw(visualizer, path: Path, sample, file: str, threshold: float) -> None:
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    settings = {"with_labels": False} if hasattr(sample, "pred_sem_seg") else {"pred_score_thr": threshold}
    visualizer.add_datasample("", pixels, sample, draw_gt=False, show=False, **settings)
    _save(visualizer.get_image(), file)


def _place(below: Path, path: Path, folder: Path) -> Path:
    return below / path.relative_to(folder).with_suffix(".png")


def _save(pixels: np.ndarray, file: str) -> None:
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, lambda partial: Image.fromarray(pixels).save(partial, format="png"))
