"""The digits: whole, the same every time, safe against a kill and a second process."""

import multiprocessing

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from linzoo.tools import make_data


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
