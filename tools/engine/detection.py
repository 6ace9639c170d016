"""What detection needs from mmdet; imported only if a config detects objects."""

from collections.abc import Sequence

from .coco import check_coco
from .data import CHECKS, NamesImages, check_heads
from .errors import InputError
from .openmmlab import import_openmmlab

try:
    import_openmmlab("mmcv.ops", "mmdet.datasets", "mmdet.evaluation", "mmdet.models")
except ImportError as e:
    raise InputError(f"the config detects objects, which needs mmdet ({e}); `pip install 'linzoo[det]'`") from e

from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS, MODELS
from mmengine.config import Config
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn import functional as F


@DATASETS.register_module()
class CocoImages(NamesImages, CocoDataset):
    """mmdet's COCO data set; `check_annotations` checks its annotations before a run.

    Args:
        make: name of a data set of `tools/make_data.py`, written to `data_root` if that is missing.
    """

    def __init__(self, make: str | None = None, **kwargs):
        super().__init__(**kwargs)

    def filter_data(self) -> list[dict]:
        """The images to train on."""
        found = super().filter_data()
        if not found:
            raise InputError(f"annotations {self.ann_file!r} hold no annotated image; expected some to train on")
        return found


def check_annotations(settings: dict, cfg: Config) -> None:
    """Checks the annotations of an mmdet data set; InputError names the first that is impossible."""
    classes = (settings.get("metainfo") or {}).get("classes", CocoDataset.METAINFO["classes"])
    check_heads(cfg.model, classes)
    masks = any(step.get("with_mask") for step in settings.get("pipeline", ()))
    folder = settings.get("data_prefix", {}).get("img", "")
    check_coco(settings.get("data_root") or "", settings["ann_file"], folder, classes, masks)


CHECKS["CocoDataset"] = check_annotations


@MODELS.register_module()
class FinerFPN(BaseModule):
    """Feature pyramid network (arXiv 1612.03144) that continues to maps finer than its inputs, as in EfficientViM.

    Laterals of the maps are summed from coarse to fine. Transposed 2x2 convolutions continue from the finest sum. Each
    level ends with a 3x3 convolution. Coarser levels come from the coarsest map by 3x3 convolutions of stride 2.

    Args:
        in_channels: Channels of the maps, from fine to coarse, each half the size of the one before.
        out_channels: Channels of every level.
        finer: Levels finer than the finest map.
        coarser: Levels coarser than the coarsest map.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int = 256, finer: int = 0, coarser: int = 0):
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(channels, out_channels, 1) for channels in in_channels)
        self.ups = nn.ModuleList(nn.ConvTranspose2d(out_channels, out_channels, 2, 2) for _ in range(finer))
        levels = finer + len(in_channels)
        self.convs = nn.ModuleList(nn.Conv2d(out_channels, out_channels, 3, padding=1) for _ in range(levels))
        widths = [in_channels[-1]] + [out_channels] * (coarser - 1)
        self.downs = nn.ModuleList(nn.Conv2d(width, out_channels, 3, 2, 1) for width in widths[:coarser])

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Maps ``(B, in_channels[i], H_i, W_i)`` to levels ``(B, out_channels, ...)``, from fine to coarse."""
        maps = [lateral(x) for lateral, x in zip(self.laterals, inputs, strict=True)]
        for i in range(len(maps) - 1, 0, -1):
            maps[i - 1] = maps[i - 1] + F.interpolate(maps[i], size=maps[i - 1].shape[2:])
        for up in self.ups:
            maps.insert(0, up(maps[0]))
        out, x = [conv(y) for conv, y in zip(self.convs, maps, strict=True)], inputs[-1]
        for down in self.downs:
            x = down(x)
            out.append(x)
        return tuple(out)
