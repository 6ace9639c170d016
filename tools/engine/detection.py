"""What detection needs of mmdet, which needs mmcv's compiled operators: imported where a config detects objects."""

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
    raise InputError(
        f"the config detects objects, which needs mmdet and mmcv with its compiled operators ({e}); "
        "`make operators` builds and installs them, which takes about ten minutes"
    ) from e

from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS


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
