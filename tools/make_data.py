"""Write a small data set, from what scikit-learn ships: `python tools/make_data.py digits`."""

import argparse
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def digits(out: str | os.PathLike) -> None:
    """scikit-learn's handwritten digits as `out/{train,val}/<digit>/<index>.png`, 8x8 grey.

    1,797 scans (UCI Optical Recognition of Handwritten Digits, test part); a fixed stratified split of 1,437 and 360.
    The folder appears whole or not at all; an existing one is left as it is.
    """
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    def write(folder: Path) -> None:
        images, labels = load_digits(return_X_y=True)
        parts = train_test_split(range(len(labels)), test_size=360, stratify=labels, random_state=0)
        for part, indices in zip(("train", "val"), parts, strict=True):
            for i in indices:
                file = folder / part / str(labels[i]) / f"{i:04d}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray((images[i].reshape(8, 8) * 255 / 16).round().astype("uint8")).save(file)

    _write_whole(Path(out), write)


def inked(out: str | os.PathLike) -> None:
    """Handwritten digits on photographs as `out/{train,val}/images/<index>.png`, 64x64, and their ink as `masks/`.

    480 and 120 of scikit-learn's digits, written 24 px wide in blue at a random place of a random crop of its two
    sample photographs: the left three quarters for training, the right quarter for validation. The same every time.
    The folder appears whole or not at all; an existing one is left as it is.
    """
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits, load_sample_images

    def write(folder: Path) -> None:
        digits, rng = load_digits().images, np.random.default_rng(0)
        photos = [Image.fromarray(photo) for photo in load_sample_images().images]
        for part, indices, (left, right) in (("train", range(480), (0, 480)), ("val", range(480, 600), (480, 640))):
            for name in ("images", "masks"):
                (folder / part / name).mkdir(parents=True)
            for i in indices:
                ink = Image.fromarray((digits[i] * 255 / 16).round().astype("uint8")).resize((24, 24), Image.BICUBIC)
                photo = photos[rng.integers(len(photos))]
                x, y = int(rng.integers(left, right - 63)), int(rng.integers(photo.height - 63))
                image, mask = photo.crop((x, y, x + 64, y + 64)), Image.new("L", (64, 64))
                place = tuple(rng.integers(41, size=2).tolist())
                image.paste((32, 32, 224), (*place, place[0] + 24, place[1] + 24), ink)
                mask.paste(ink.point(lambda value: 255 * (value > 127)), place)
                image.save(folder / part / "images" / f"{i:04d}.png")
                mask.save(folder / part / "masks" / f"{i:04d}.png")

    _write_whole(Path(out), write)


def bouncing(out: str | os.PathLike) -> None:
    """Clips of two handwritten digits that bounce off the borders: `out/{train,val}.npy`, uint8 (clips, 20, 32, 32).

    400 clips of scikit-learn's first 1,437 digits and 60 of the others, each drawn 14 px wide on black. A digit starts
    anywhere, moves one to three pixels a frame along either axis, and is reflected at the borders; where two meet, the
    brighter shows. The same every time. The folder appears whole or not at all; an existing one is left as it is.
    """
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    frames, side, width = 20, 32, 14
    room = side - width

    def write(folder: Path) -> None:
        digits, rng = load_digits().images, np.random.default_rng(0)
        images = [Image.fromarray((digit * 255 / 16).round().astype("uint8")) for digit in digits]
        drawn = np.stack([np.asarray(image.resize((width, width), Image.BICUBIC)) for image in images])
        for part, count, (first, last) in (("train", 400, (0, 1437)), ("val", 60, (1437, len(drawn)))):
            clips = np.zeros((count, frames, side, side), np.uint8)
            for clip in clips:
                for digit in drawn[rng.integers(first, last, 2)]:
                    start, speed = rng.integers(room + 1, size=2), rng.integers(1, 4, 2) * rng.choice([-1, 1], 2)
                    path = (start + speed * np.arange(frames)[:, None]) % (2 * room)
                    for frame, (y, x) in zip(clip, room - abs(path - room), strict=True):
                        patch = frame[y : y + width, x : x + width]
                        np.maximum(patch, digit, out=patch)
            np.save(folder / f"{part}.npy", clips)

    _write_whole(Path(out), write)


def noisy(out: str | os.PathLike) -> None:
    """Grey photographs with Gaussian noise of sigma 25 (of 255), as `out/{train,val}/{input,target}/<name>.tif|png`.

    What scikit-learn and scikit-image ship: seven photographs to train on, and 15 crops of 128 px of two others to
    validate on. Targets are 8-bit PNGs, inputs float32 TIFFs with white at 1, so that the noise is not clipped. The
    same every time. The folder appears whole or not at all; an existing one is left as it is.
    """
    import numpy as np
    from PIL import Image
    from skimage import data
    from sklearn.datasets import load_sample_images

    def write(folder: Path) -> None:
        rng = np.random.default_rng(0)
        china, flower = load_sample_images().images
        names = ("astronaut", "coffee", "rocket", "brick", "grass")
        train = {"china": china, "flower": flower, **{name: getattr(data, name)() for name in names}}
        photos = {name: np.asarray(Image.fromarray(photo).convert("L")) for name, photo in train.items()}
        held_out = {
            name: np.asarray(Image.fromarray(getattr(data, name)()).convert("L")) for name in ("camera", "chelsea")
        }
        crops = {}
        for name, photo in held_out.items():
            for y in range(0, photo.shape[0] - 127, 160):
                for x in range(0, photo.shape[1] - 127, 160):
                    crops[f"{name}_{y:03d}_{x:03d}"] = photo[y : y + 128, x : x + 128]
        for part, targets in (("train", photos), ("val", crops)):
            for kind in ("input", "target"):
                (folder / part / kind).mkdir(parents=True)
            for name, target in targets.items():
                Image.fromarray(target).save(folder / part / "target" / f"{name}.png")
                noise = rng.normal(0, 25 / 255, target.shape)
                Image.fromarray((target / 255 + noise).astype(np.float32)).save(folder / part / "input" / f"{name}.tif")

    _write_whole(Path(out), write)


def _write_whole(out: Path, write: Callable[[Path], None]) -> None:
    """Call `write(folder)` on a temporary folder and move it to `out`, unless that is there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    # Several training processes may start at once.
    with FileLock(out.parent / f".{out.name}.lock"):
        if out.exists():
            return
        for leftover in out.parent.glob(f".{out.name}-*"):
            shutil.rmtree(leftover)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        write(temporary)
        temporary.chmod(0o755)
        temporary.rename(out)


MAKERS = {"bouncing": bouncing, "digits": digits, "inked": inked, "noisy": noisy}


def main(argv: list[str] | None = None) -> None:
    """Command line of `make_data`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=MAKERS)
    parser.add_argument("--out", help="folder to write; default: data/NAME")
    args = parser.parse_args(argv)
    out = args.out or f"data/{args.name}"
    MAKERS[args.name](out)
    print(out)


if __name__ == "__main__":
    main()
