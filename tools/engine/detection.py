"""What detection needs of mmdet: imported where a config detects objects."""

import contextlib
import io
import json
import warnings

from .data import _NamesImages
from .errors import InputError

try:
    import mmcv.ops  # noqa: F401

    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mmdet.datasets
        import mmdet.evaluation
        import mmdet.models  # noqa: F401
except ImportError as e:
    raise InputError(f"the config detects objects, which needs mmdet ({e}); `pip install 'linzoo[det]'`") from e

from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS, MODELS
from mmengine.model import BaseModule
from torch import nn
from torch.nn import functional as F


@DATASETS.register_module()
class CocoImages(_NamesImages, CocoDataset):
    """mmdet's COCO data set, which refuses annotations that it would otherwise skip in silence.

    Args:
        make: name of a data set of `tools/make_data.py`, written to `data_root` where that is absent.

    Raises:
        InputError: the file is no COCO file; it has an annotation of a category that it does not define, or a category
            that the classes do not name, or lacks one that they do; no image to train on has an annotation.
    """

    def __init__(self, make: str | None = None, **kwargs):
        super().__init__(**kwargs)

    def load_data_list(self) -> list[dict]:
        """The images with their annotations."""
        try:
            found = super().load_data_list()
        except (json.JSONDecodeError, KeyError, TypeError, AssertionError) as e:
            raise InputError(f"annotations {self.ann_file!r} cannot be read; expected a COCO file ({e!r})") from e
        if len(self.cat_ids) < len(self.metainfo["classes"]):
            raise InputError(
                f"annotations {self.ann_file!r} have {len(self.cat_ids)} of the data set's "
                f"{len(self.metainfo['classes'])} classes; expected a category for each of {self.metainfo['classes']}"
            )
        return found

    def parse_data_info(self, raw_data_info: dict) -> dict:
        """An image's entry; InputError for an annotation of an unknown category."""
        for annotation in raw_data_info["raw_ann_info"]:
            category = annotation["category_id"]
            if category not in self.cat_ids:
                name = self.coco.cats.get(category, {}).get("name")
                raise InputError(
                    f"annotations {self.ann_file!r}: annotation {annotation['id']} has the unknown category {category}"
                    f"{f' ({name!r})' if name else ''}; expected one of {self.metainfo['classes']}"
                )
        return super().parse_data_info(raw_data_info)

    def filter_data(self) -> list[dict]:
        """The images to train on."""
        found = super().filter_data()
        if not found:
            raise InputError(f"annotations {self.ann_file!r} hold no annotated image; expected some to train on")
        return found


@MODELS.register_module()
class FinerFPN(BaseModule):
    """Feature pyramid network (arXiv 1612.03144) that goes on to finer maps than it is given, as EfficientViM has it.

    Laterals of the maps are summed from coarse to fine; transposed 2x2 convolutions go on from the finest sum; each
    level ends with a 3x3 convolution. Coarser levels come from the coarsest map by 3x3 convolutions of stride 2.

    Args:
        in_channels: Channels of the maps, from fine to coarse, each of half the size of the one before.
        out_channels: Channels of every level.
        finer: Levels finer than the finest map.
        coarser: Levels coarser than the coarsest one.
    """

    def __init__(self, in_channels, out_channels=256, finer=0, coarser=0):
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(channels, out_channels, 1) for channels in in_channels)
        self.ups = nn.ModuleList(nn.ConvTranspose2d(out_channels, out_channels, 2, 2) for _ in range(finer))
        levels = finer + len(in_channels)
        self.convs = nn.ModuleList(nn.Conv2d(out_channels, out_channels, 3, padding=1) for _ in range(levels))
        widths = [in_channels[-1]] + [out_channels] * (coarser - 1)
        self.downs = nn.ModuleList(nn.Conv2d(width, out_channels, 3, 2, 1) for width in widths[:coarser])

    def forward(self, inputs):
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
