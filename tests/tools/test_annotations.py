"""COCO files as users have them: for detection and for prompts, one line that names the annotation, before a run."""

import json

import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from tasks import write_task
from test_bad_input import refused

from linzoo.tools import train
from linzoo.tools.engine import InputError, PromptedMasks
from linzoo.tools.engine.coco import check_coco

DETECTION = dict(classes=("thing",), masks=True)
PROMPTS = dict()


@pytest.fixture
def coco():
    """A file's content, all of it right: a polygon, run lengths, a crowd, ids that leave gaps."""
    square = [4, 4, 20, 4, 20, 20, 4, 20]
    counts = [100, 10, 44 * 60 - 110]
    common = dict(image_id=7, category_id=3, area=9.0, bbox=[4, 4, 16, 16], iscrowd=0)
    return dict(
        images=[dict(id=7, file_name="a.png", height=44, width=60)],
        categories=[dict(id=3, name="thing"), dict(id=90, name="other")],
        annotations=[
            dict(common, id=11, segmentation=[square]),
            dict(common, id=40, segmentation=dict(size=[44, 60], counts=counts), iscrowd=1),
        ],
    )


@pytest.fixture
def check(tmp_path):
    """Function that checks a file's content."""
    Image.new("RGB", (60, 44)).save(tmp_path / "a.png")

    def run(coco, **kwargs):
        (tmp_path / "coco.json").write_text(json.dumps(coco))
        return check_coco(str(tmp_path), "coco.json", **kwargs)

    return run


@pytest.mark.parametrize("use", [DETECTION, PROMPTS], ids=["detection", "prompts"])
def test_right(coco, check, use):
    assert check(coco, **use).name == "coco.json"


def counts_of_another_size():
    import numpy as np

    return coco_mask.encode(np.asfortranarray(np.ones((60, 44), np.uint8)))["counts"].decode()


FAULTS = {
    "two points": (dict(segmentation=[[1, 1, 9, 9]]), r"has the polygon \[1, 1, 9, 9\]; expected three points or more"),
    "an empty polygon": (dict(segmentation=[[]]), r"has the polygon \[\]; expected three points"),
    "an odd number": (dict(segmentation=[[1, 1, 9, 9, 5, 5, 3]]), "expected three points or more, x and y of each"),
    "one list": (dict(segmentation=[1, 1, 9, 9, 5, 5]), "has the polygon 1; expected three points"),
    "NaN": (dict(segmentation=[[1, 1, 9, float("nan"), 5, 5]]), "far outside of its image of 60 x 44, or no numbers"),
    "infinite": (dict(segmentation=[[1, 1, 9, float("inf"), 5, 5]]), "has a polygon far outside"),
    "huge": (dict(segmentation=[[1, 1, 1e9, 9, 5, 5]]), "has a polygon far outside of its image"),
    "another size": (
        dict(segmentation=dict(size=[60, 44], counts=counts_of_another_size())),
        r"has run lengths of the size \[60, 44\]; expected \[44, 60\] as its image",
    ),
    "too many pixels": (
        dict(segmentation=dict(size=[44, 60], counts=[0, 9999])),
        "has run lengths of 9999 pixels; expected 2640",
    ),
    "negative run": (dict(segmentation=dict(size=[44, 60], counts=[-4, 2644])), "has run lengths of 2640 pixels"),
    "NaN in the box": (dict(bbox=[1, 1, float("nan"), 4]), r"has the box \[1, 1, nan, 4\]; expected x, y, width and"),
    "a negative box": (dict(bbox=[9, 9, -4, 4]), r"has the box \[9, 9, -4, 4\]"),
    "a huge box": (dict(bbox=[0, 0, 1e9, 4]), "has the box"),
    "three numbers": (dict(bbox=[0, 0, 4]), "has the box"),
    "no image": (dict(image_id=8), "is of the image 8, which the file does not have"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("use", [DETECTION, PROMPTS], ids=["detection", "prompts"])
def test_impossible(coco, check, use, fault):
    changes, said = FAULTS[fault]
    coco["annotations"][0] |= changes
    with pytest.raises(InputError, match=f"annotations '.*coco.json': annotation 11 .*{said}"):
        check(coco, **use)


@pytest.mark.parametrize("use", [DETECTION, PROMPTS], ids=["detection", "prompts"])
def test_ids(coco, check, use, tmp_path):
    for part, what in (("images", "image id 7"), ("annotations", "annotation id 11")):
        twice = {**coco, part: [*coco[part], coco[part][0]]}
        with pytest.raises(InputError, match=f"two have the {what}; expected one each"):
            check(twice, **use)
    (tmp_path / "a.png").unlink()
    with pytest.raises(InputError, match=r"image '.*a.png' not found \(1 such\)"):
        check(coco, **use)


def test_classes(coco, check, capsys):
    """The file's order of categories is that of the labels; none is missing or unknown."""
    both = dict(classes=("thing", "other"))
    check(coco, **both)
    with pytest.raises(InputError, match=r"in the order \['thing', 'other'\]; expected \['other', 'thing'\]"):
        check(coco, classes=("other", "thing"))
    with pytest.raises(InputError, match="have 1 of the data set's 2 classes"):
        check(coco, classes=("thing", "else"))
    coco["annotations"][0]["category_id"] = 90
    with pytest.raises(InputError, match=r"annotation 11 has the unknown category 90 \('other'\); expected one of"):
        check(coco, **DETECTION)
    coco["annotations"][0] |= dict(category_id=3, segmentation=[])
    with pytest.raises(InputError, match="annotation 11 has no mask; expected a segmentation"):
        check(coco, **DETECTION)
    check(coco, classes=("thing",))
    capsys.readouterr()
    coco["annotations"][0]["bbox"] = [3, 3, 0.2, 5]
    check(coco, classes=("thing",))
    assert "1 objects of" in (said := capsys.readouterr().err) and "left out, such as annotation 11" in said


@pytest.mark.parametrize("content", ["", "{", "[]", '{"images": []}', '{"images": 3, "annotations": []}', "\xff"])
def test_no_coco_file(check, tmp_path, content):
    (tmp_path / "coco.json").write_text(content, encoding="latin-1")
    with pytest.raises(InputError, match="cannot be read .* expected COCO's images and annotations"):
        check_coco(str(tmp_path), "coco.json")


def test_training_is_not_begun(tmp_path, capsys):
    tiny = write_task("promptable", tmp_path)
    file = tmp_path / "data/coco/train.json"
    coco = json.loads(file.read_text())
    coco["annotations"][0]["segmentation"] = [[1, 1, 9, 9]]
    file.write_text(json.dumps(coco))
    line = refused(capsys, train.main, tiny.config, "--work-dir", tmp_path / "w")
    assert "annotation 1 has the polygon [1, 1, 9, 9]" in line and not (tmp_path / "w").exists()


def test_crowds_are_counted(tmp_path, capsys):
    write_task("promptable", tmp_path)
    PromptedMasks(str(tmp_path / "data/coco"), "train.json", "train")
    assert "4 of 12 objects of" in (said := capsys.readouterr().err) and "are crowds or without mask: left out" in said
