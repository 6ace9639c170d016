"""The digits: whole, the same every time, safe against a kill and a second process."""

import json
import multiprocessing
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from linzoo.tools import make_data


def few_digits(out):
    """The digits as `make_data.digits` writes them, of those held out six of a class."""
    make_data.digits(out)
    for folder in Path(out, "val").iterdir():
        for file in sorted(folder.iterdir())[6:]:
            file.unlink()


def test_digits(tmp_path, capsys):
    make_data.main(["digits", "--out", str(tmp_path / "digits")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "digits")
    images, labels = load_digits(return_X_y=True)
    seen = []
    for part, count in (("train", 1437), ("val", 360)):
        files = sorted((tmp_path / "digits" / part).glob("*/*.png"))
        assert len(files) == count
        seen += [int(file.stem) for file in files]
        assert all(labels[int(file.stem)] == int(file.parent.name) for file in files)
    assert sorted(seen) == list(range(1797)), "every scan once, in one part only"
    per_class = [len(list((tmp_path / "digits/val" / str(digit)).iterdir())) for digit in range(10)]
    assert min(per_class) >= 35 and max(per_class) <= 37
    file = next((tmp_path / "digits/val/3").iterdir())
    pixels = np.asarray(Image.open(file), dtype=float)
    assert np.abs(pixels * 16 / 255 - images[int(file.stem)].reshape(8, 8)).max() < 0.05


def test_halves_of_the_digits(tmp_path):
    """The same scans in the same parts."""
    for name in ("digits", "low_digits", "high_digits"):
        make_data.main([name, "--out", str(tmp_path / name)])
    whole, low, high = (
        {str(file.relative_to(tmp_path / name)) for file in (tmp_path / name).rglob("*.png")}
        for name in ("digits", "low_digits", "high_digits")
    )
    assert low | high == whole and not low & high
    assert sum(file.startswith("train") for file in low) == 721 and sum(file.startswith("val") for file in high) == 180


def test_inked(tmp_path):
    """Images with masks of equal names, the ink alone in them, the same every time."""
    for name in ("one", "two"):
        make_data.main(["inked", "--out", str(tmp_path / name)])
    for part, count in (("train", 480), ("val", 120)):
        images = sorted((tmp_path / "one" / part / "images").iterdir())
        masks = sorted((tmp_path / "one" / part / "masks").iterdir())
        assert [file.name for file in images] == [file.name for file in masks] and len(images) == count
        for file in (*images, *masks):
            assert file.read_bytes() == (tmp_path / "two" / file.relative_to(tmp_path / "one")).read_bytes()
        for image, mask in zip(images[:20], masks, strict=False):
            pixels, inside = (np.asarray(Image.open(file)) for file in (image, mask))
            assert pixels.shape == (64, 64, 3) and inside.shape == (64, 64) and set(np.unique(inside)) == {0, 255}
            blue = np.abs(pixels.astype(float) - (32, 32, 224)).max(-1)
            assert blue[inside > 0].mean() < 80 < blue[inside == 0].mean()


def test_bouncing(tmp_path):
    """Two digits that move at constant speed but at the borders, other digits in either part, the same every time."""
    for name in ("one", "two"):
        make_data.main(["bouncing", "--out", str(tmp_path / name)])
    for part, count in (("train", 400), ("val", 60)):
        clips = np.load(tmp_path / "one" / f"{part}.npy")
        assert np.array_equal(clips, np.load(tmp_path / "two" / f"{part}.npy"))
        assert clips.shape == (count, 20, 32, 32) and clips.dtype == np.uint8
        assert (clips.max((2, 3)) > 200).all()
        assert (np.abs(np.diff(clips.astype(int), axis=1)).max((2, 3)) > 50).all(), "every frame moves"
        ink = clips.astype(float).sum((2, 3))
        assert (ink.max(1) / ink.min(1)).max() < 2.5, "what is hidden is hidden behind the other digit"


def test_patches(tmp_path, monkeypatch):
    """Ten classes of grey crops, the same every time; where a photograph is validated on, it does not train."""
    for name in ("one", "two"):
        make_data.main(["patches", "--out", str(tmp_path / name)])
    for part, count in (("train", 300), ("val", 150)):
        for name in make_data.PATCH_CLASSES:
            files = sorted((tmp_path / "one" / part / name).iterdir())
            assert len(files) == count
            for file in files[:20]:
                assert Image.open(file).size == (32, 32) and Image.open(file).mode == "L"
                assert file.read_bytes() == (tmp_path / "two" / file.relative_to(tmp_path / "one")).read_bytes()
    seen, crop = {"train": np.zeros((512, 512), bool), "val": np.zeros((512, 512), bool)}, Image.Image.crop

    def note(photo, box):
        boxes.append(box)
        return crop(photo, box)

    boxes = []
    monkeypatch.setattr(make_data, "PATCH_CLASSES", ["camera"])
    monkeypatch.setattr(Image.Image, "crop", note)
    make_data.patches(tmp_path / "three")
    for part, found in (("train", boxes[:300]), ("val", boxes[300:])):
        for left, top, right, bottom in found:
            seen[part][top:bottom, left:right] = True
    assert len(boxes) == 450 and not (seen["train"] & seen["val"]).any()
    assert seen["train"].mean() > 0.5 and seen["val"].mean() > 0.15


def test_scenes(tmp_path):
    """Label maps, boxes and masks tell the same of every image; digits stand out; the same every time."""
    for name in ("one", "two"):
        make_data.main(["scenes", "--out", str(tmp_path / name)])
    files = sorted(file for file in (tmp_path / "one").rglob("*") if file.is_file())
    assert len(files) == 2 * (400 + 80) + 2
    for file in files:
        assert file.read_bytes() == (tmp_path / "two" / file.relative_to(tmp_path / "one")).read_bytes()
    for part, count in (("training", 400), ("validation", 80)):
        coco = json.loads((tmp_path / "one" / f"{part}.json").read_text())
        assert len(coco["images"]) == count
        assert [(c["id"], c["name"]) for c in coco["categories"]] == [(i + 1, str(i)) for i in range(10)]
        assert {a["category_id"] for a in coco["annotations"]} == set(range(1, 11))
        for image in coco["images"][:: count // 20]:
            pixels = np.asarray(Image.open(tmp_path / "one/images" / part / image["file_name"])).astype(float)
            labels = np.asarray(Image.open(tmp_path / "one/annotations" / part / image["file_name"]))
            assert pixels.shape == (image["height"], image["width"], 3) == (128, 128, 3)
            digits = [a for a in coco["annotations"] if a["image_id"] == image["id"]]
            assert 2 <= len(digits) <= 4
            seen = np.zeros_like(labels)
            for digit in digits:
                counts = digit["segmentation"]["counts"]
                runs = np.repeat(np.arange(len(counts)) % 2, counts)
                mask = runs.reshape(128, 128).T.astype(bool)
                assert mask.sum() == digit["area"] and (labels[mask] == digit["category_id"] + 1).all()
                x, y, width, height = digit["bbox"]
                rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
                assert (rows[0], rows[-1], columns[0], columns[-1]) == (y, y + height - 1, x, x + width - 1)
                around = np.zeros_like(mask)
                around[y : y + height, x : x + width] = labels[y : y + height, x : x + width] == 1
                assert abs(pixels[mask].mean() - pixels[around].mean()) > 20
                seen[mask] += 1
            assert seen.max() == 1 and ((labels > 1) == (seen == 1)).all()


def test_leftovers_and_second_process(tmp_path):
    """A part-written folder of a killed process goes; processes that start together make one folder."""
    (tmp_path / ".digits-killed/train").mkdir(parents=True)
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=make_data.digits, args=(tmp_path / "digits",)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")) == ["digits"]
    assert len(list((tmp_path / "digits").rglob("*.png"))) == 1797
