"""Folders of users' own, and a model fine-tuned on them."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from linzoo.tools import finetune, train
from linzoo.tools.engine.errors import InputError
from linzoo.tools.engine.layouts import arrange, find_task

SIDE = 48


def picture(seed: int, mode: str = "RGB") -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (SIDE, SIDE, 3), np.uint8)).convert(mode)


def save(image: Image.Image, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def write_classes(root: Path, parts=("",), count=5) -> Path:
    for part in parts:
        for label, mode in (("cat", "RGB"), ("dog", "L"), ("eel", "RGBA")):
            for i in range(count):
                save(picture(i, mode), root / part / label / f"{i}.png")
    return root


def write_table(root: Path, column="file_name") -> Path:
    write_classes(root / "all")
    with open(root / "metadata.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow([column, "label"])
        rows.writerows((path.relative_to(root), path.parent.name) for path in sorted(root.rglob("*.png")))
    return root


def write_maps(root: Path, high=255, ending=".png", parts=("",), inside=False) -> Path:
    for part in parts:
        for i in range(6):
            labels = np.zeros((SIDE, SIDE), np.uint8)
            labels[8 : 20 + i, 8:30] = high
            image, label_map = (Path(name, part) if inside else Path(part, name) for name in ("images", "masks"))
            save(picture(i), root / image / f"{i}{ending}")
            save(Image.fromarray(labels), root / label_map / f"{i}.png")
    return root


def write_coco(root: Path, masks=True, objects=1) -> Path:
    images = [dict(id=i, file_name=f"{i}.png", height=SIDE, width=SIDE) for i in range(6)]
    for image in images:
        save(picture(image["id"]), root / "images" / image["file_name"])
    outline = dict(segmentation=[[8, 8, 30, 8, 30, 30, 8, 30]]) if masks else {}
    found = [
        dict(id=i, image_id=i, category_id=3, bbox=[8, 8, 22, 22], area=484, iscrowd=0, **outline)
        for i in range(6 * objects)
    ]
    content = dict(images=images, annotations=found, categories=[dict(id=3, name="box")])
    (root / "annotations.json").write_text(json.dumps(content))
    return root


def write_targets(root: Path, mode="RGB") -> Path:
    for i in range(6):
        for name in ("input", "target"):
            save(picture(i, mode), root / name / f"{i}.png")
    return root


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [("",), ("train",), ("train", "val"), ("training", "validation")])
def test_class_folders(tmp_path, parts, capsys):
    data = write_classes(tmp_path / "data", parts)
    assert find_task(data) == "cls"
    found = arrange(data, "cls", tmp_path / "out")
    assert found.classes == ["cat", "dog", "eel"] and found.side == SIDE
    both = len(parts) == 2
    assert found.counts == ({"train": 15, "val": 15} if both else {"train": 12, "val": 3})
    assert ("drawn with seed 0" in capsys.readouterr().err) != both
    again = arrange(data, "cls", tmp_path / "again")
    names = [sorted(p.name for p in (tmp_path / out / "val").rglob("*.png")) for out in ("out", "again")]
    assert names[0] == names[1] and again == found, "the same split each time"


@pytest.mark.parametrize("column", ["file_name", "Path"])
def test_table_of_classes(tmp_path, column):
    data = write_table(tmp_path / "data", column)
    for place in (data, data / "metadata.csv"):
        assert find_task(place) == "cls"
        assert arrange(place, "cls", tmp_path / "out").counts == {"train": 12, "val": 3}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("parts", [("",), ("train", "val")])
def test_label_maps(tmp_path, parts, inside):
    data = write_maps(tmp_path / "data", high=2, ending=".jpg", parts=parts, inside=inside)
    (data / "classes.txt").write_text("ground\nwater\nwood\n")
    assert find_task(data) == "seg"
    found = arrange(data, "seg", tmp_path / "out")
    assert found.classes == ["ground", "water", "wood"] and found.suffix == ".jpg"
    assert found.counts == ({"train": 6, "val": 6} if len(parts) == 2 else {"train": 5, "val": 1})
    assert len(list((tmp_path / "out/maps/train").glob("*.png"))) == found.counts["train"]


def test_masks_of_255_are_two_classes(tmp_path):
    found = arrange(write_maps(tmp_path / "data"), "seg", tmp_path / "out")
    maps = [np.asarray(Image.open(path)) for path in (tmp_path / "out/maps").rglob("*.png")]
    assert found.classes == ["0", "1"] and all(set(np.unique(m)) == {0, 1} for m in maps)


@pytest.mark.parametrize("masks", [True, False])
def test_coco(tmp_path, masks):
    data = write_coco(tmp_path / "data", masks)
    for place in (data, data / "annotations.json"):
        assert find_task(place) == "det"
        found = arrange(place, "det", tmp_path / "out")
        assert found.classes == ["box"] and found.counts == {"train": 5, "val": 1} and found.masks == masks
        parts = [json.loads((tmp_path / "out" / f"{part}.json").read_text()) for part in ("train", "val")]
        assert [len(part["annotations"]) for part in parts] == [5, 1]
        for part, content in zip(("train", "val"), parts, strict=True):
            assert all((tmp_path / "out" / part / image["file_name"]).is_file() for image in content["images"])


def as_coco_has_it(data: Path, part: str, year: str) -> None:
    (data / "images").rename(data / f"{part}{year}")
    (data / "annotations").mkdir(exist_ok=True)
    (data / "annotations.json").rename(data / "annotations" / f"instances_{part}{year}.json")
    (data / "annotations" / f"captions_{part}{year}.json").write_text('{"annotations": []}')


def as_roboflow_has_it(data: Path, part: str, year: str) -> None:
    (data / "images").rename(data / part)
    (data / "annotations.json").rename(data / part / "_annotations.coco.json")


@pytest.mark.parametrize(
    "lay_out, parts", [(as_coco_has_it, ("train", "val")), (as_roboflow_has_it, ("train", "valid"))]
)
def test_layouts_of_coco_and_roboflow(tmp_path, lay_out, parts):
    for part in parts:
        lay_out(write_coco(tmp_path / "data"), part, "2017")
    assert find_task(tmp_path / "data") == "det"
    found = arrange(tmp_path / "data", "det", tmp_path / "out")
    assert found.counts == {"train": 6, "val": 6} and found.classes == ["box"]
    assert len(list((tmp_path / "out" / "val").glob("*.png"))) == 6


@pytest.mark.parametrize("mode, channels", [("RGB", 3), ("L", 1)])
def test_targets(tmp_path, mode, channels):
    data = write_targets(tmp_path / "data", mode)
    assert find_task(data) == "restore"
    assert arrange(data, "restore", tmp_path / "out").channels == channels


def one_class(root):
    write_classes(root)
    for label in ("dog", "eel"):
        (root / label).rename(root.parent / label)


def empty_class(root):
    write_classes(root)
    (root / "fox").mkdir()


def lonely_image(root):
    write_maps(root)
    (root / "masks" / "3.png").unlink()


def odd_size(root):
    write_maps(root)
    save(Image.new("L", (5, 5)), root / "masks" / "3.png")


def no_objects(root):
    write_coco(root, objects=0)


def no_columns(root):
    write_table(root, "photo")


def missing_image(root):
    write_table(root)
    next((root / "all" / "cat").iterdir()).unlink()


def single(root):
    save(picture(0), root / "a" / "0.png")
    save(picture(0), root / "b" / "0.png")


def other_classes(root):
    write_classes(root, ("train", "val"))
    (root / "val" / "cat").rename(root / "val" / "cow")


@pytest.mark.parametrize(
    "write, said",
    [
        (one_class, "has one class, 'cat'; expected two at least"),
        (empty_class, r"class folder '.*fox' holds no image"),
        (lonely_image, r"image '.*3.png' is alone \(1 such\); expected a file named '3' in '.*masks'"),
        (odd_size, "label map '.*3.png' is 5 x 5; expected 48 x 48 as its image"),
        (no_objects, "hold no object; expected some to train on"),
        (no_columns, r"has the columns \['photo', 'label'\]; expected file_name and label"),
        (missing_image, r"line \d+: no such file '.*'; expected an image and its class"),
        (other_classes, "nothing of the class 'cow' is in the training part"),
        (lambda root: root.mkdir(), "is of no layout that is known; expected one of: a folder of images per class"),
    ],
)
def test_data_that_does_not_fit(tmp_path, write, said):
    data = tmp_path / "data"
    write(data)
    with pytest.raises(InputError, match=said):
        arrange(data, find_task(data), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


def test_a_class_with_one_image(tmp_path, capsys):
    data = tmp_path / "data"
    single(data)
    arrange(data, "cls", tmp_path / "out")
    assert "class 'a' has one image, which trains and validates" in capsys.readouterr().err


# --- runs -------------------------------------------------------------------------------------------------------------


def run(model: str, data: Path, out: Path, *options: str) -> str:
    finetune.main([model, str(data), "--work-dir", str(out), "--epochs", "1", "--workers", "0", *options])
    return (out / "report.html").read_text()


@pytest.mark.parametrize("kind", ["wara", pytest.param("lora", marks=pytest.mark.slow)])
def test_adapters(tmp_path, kind):
    """What is exported is plain, and differs from the start in the projections and the head alone, by a low rank."""
    torch.manual_seed(0)
    start = timm.create_model("test_vit").state_dict()
    torch.save(start, tmp_path / "w.pth")
    data, out = write_classes(tmp_path / "data"), tmp_path / "out"
    run("test_vit", data, out, "--weights", str(tmp_path / "w.pth"), "--adapter", kind, "--rank", "2", "--size", "160")
    trained = timm.create_model(f"local-dir:{out}/export", pretrained=True).state_dict()
    assert trained.keys() == start.keys()
    changed = {key for key in start if not key.startswith("head.") and not torch.equal(start[key], trained[key])}
    parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert changed == {f"blocks.{i}.{part}.weight" for i in range(6) for part in parts}
    change = trained["blocks.0.mlp.fc1.weight"].double() - start["blocks.0.mlp.fc1.weight"].double()
    assert torch.linalg.matrix_rank(change, rtol=1e-3) == (2 if kind == "lora" else 4)


@pytest.mark.slow
def test_rounded_weights(tmp_path):
    """The exported projections have 2^3 values a row; everything else learns as usual."""
    torch.manual_seed(0)
    start = timm.create_model("test_vit").state_dict()
    torch.save(start, tmp_path / "w.pth")
    data, out = write_classes(tmp_path / "data"), tmp_path / "out"
    run(
        "test_vit",
        data,
        out,
        "--weights",
        str(tmp_path / "w.pth"),
        "--weight-bits",
        "3",
        "--epochs",
        "4",
        "--size",
        "160",
    )
    trained = timm.create_model(f"local-dir:{out}/export", pretrained=True).state_dict()
    assert trained.keys() == start.keys()
    for row in trained["blocks.0.mlp.fc1.weight"]:
        assert row.unique().numel() <= 8 and (row != 0).all()
    assert not torch.equal(trained["norm.weight"], start["norm.weight"])


@pytest.mark.parametrize("options", [(), ("--freeze", "--size", "32")])
def test_classifier(tmp_path, options, capsys):
    """From files to a report; the weights load in timm, the config goes on by hand, the work dir is not overwritten."""
    data, out = write_classes(tmp_path / "data"), tmp_path / "out"
    page = run("test_byobnet", data, out, *options)
    assert "accuracy/top1" in capsys.readouterr().out
    assert all(word in page for word in ("Worst mistakes", "<td>eel</td>", "F1", "data:image/png;base64,"))
    assert not re.search(r'src="(?!data:)', page), "one file, no network"
    model = timm.create_model(f"local-dir:{out}/export", pretrained=True)
    assert model.num_classes == 3 and model.pretrained_cfg["label_names"] == ["cat", "dog", "eel"]
    train.main([str(out / "config.py"), "--work-dir", str(tmp_path / "by hand")])
    with pytest.raises(SystemExit):
        run("test_byobnet", data, out)
    assert "holds a run; --resume continues it" in capsys.readouterr().err
    run("test_byobnet", data, out, "--resume")


def test_head_alone_learns(tmp_path):
    """With --freeze, all but the classifier stays as it was, running statistics included."""
    data, start = write_classes(tmp_path / "data"), tmp_path / "start.pth"

    before = timm.create_model("test_byobnet", num_classes=3).state_dict()
    torch.save(before, start)
    run("test_byobnet", data, tmp_path / "out", "--freeze", "--weights", str(start))
    after = timm.create_model(f"local-dir:{tmp_path}/out/export", pretrained=True).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("head.fc") for name in changed)


@pytest.mark.slow
def test_segmenter(tmp_path):
    data = write_maps(tmp_path / "data", parts=("train", "val"))
    for name in ("images", "masks"):  # of another size than the others
        save(Image.open(data / "val" / name / "0.png").resize((60, 40), 0), data / "val" / name / "0.png")
    page = run("test_convnext", data, tmp_path / "out")
    assert all(word in page for word in ("mIoU", "IoU", "Worst images"))


@pytest.mark.slow
@pytest.mark.parametrize("masks", [True, False])
def test_detector(tmp_path, masks):
    pytest.importorskip("mmdet")
    page = run("test_convnext", write_coco(tmp_path / "data", masks), tmp_path / "out")
    assert "<td>box</td>" in page


@pytest.mark.slow
def test_restorer(tmp_path):
    page = run("restore_rwkv_light", write_targets(tmp_path / "data"), tmp_path / "out", "--size", "32")
    assert "restore/PSNR" in page and "Restored images" in page


@pytest.mark.parametrize(
    "argv, said",
    [
        (["groupmamba"], "MODEL 'groupmamba': no such model in timm or LinZoo (did you mean"),
        (["restore_rwkv"], "MODEL 'restore_rwkv' is of kind 'restoration', which --task cls does not train"),
        (["test_byobnet", "--size", "50"], "--size 50: expected a multiple of 32"),
        (["test_byobnet", "--epochs", "0"], "--epochs 0: expected a positive number"),
        (["test_byobnet", "--lr", "nan"], "--lr nan: expected a positive number"),
        (["test_vit", "--adapter", "lora"], "--adapter lora without --weights: expected weights to adapt"),
        (["test_vit", "--adapter", "lora", "--freeze"], "--adapter lora and --freeze True: expected one of them"),
        (["test_vit", "--adapter", "lora", "--task", "seg"], "--adapter lora with --task seg: expected --task cls"),
        (["test_vit", "--weight-bits", "1"], "--weight-bits 1: expected 2 to 8"),
        (["test_byobnet", "--weights", "absent.pth"], "--weights 'absent.pth': no such file"),
    ],
)
def test_what_is_refused(tmp_path, capsys, argv, said):
    data = write_classes(tmp_path / "data")
    with pytest.raises(SystemExit) as ended:
        finetune.main([argv[0], str(data), "--work-dir", str(tmp_path / "out"), *argv[1:]])
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 2 and line.startswith("error: ") and said in line
    assert not (tmp_path / "out" / "config.py").exists()
