"""Write a small data set from what scikit-learn ships: `python tools/make_data.py digits`."""

import argparse
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

if TYPE_CHECKING:
    import numpy as np


def digits(out: str | os.PathLike, kept: range = range(10)) -> None:
    """scikit-learn's handwritten digits as `out/{train,val}/<digit>/<index>.png`, 8x8 grey; only those in `kept`.

    1,797 scans (UCI Optical Recognition of Handwritten Digits, test part) in a fixed stratified split of 1,437 and 360.
    The folder appears whole or not at all; an existing one is left as it is.
    """
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    def write(folder: Path) -> None:
        images, labels = load_digits(return_X_y=True)
        parts = train_test_split(range(len(labels)), test_size=360, stratify=labels, random_state=0)
        for part, indices in zip(("train", "val"), parts, strict=True):
            for i in (i for i in indices if labels[i] in kept):
                file = folder / part / str(labels[i]) / f"{i:04d}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray((images[i].reshape(8, 8) * 255 / 16).round().astype("uint8")).save(file)

    _write_whole(Path(out), write)


def low_digits(out: str | os.PathLike) -> None:
    """The `digits` 0 to 4, 721 and 180 of them."""
    digits(out, range(5))


def high_digits(out: str | os.PathLike) -> None:
    """The `digits` 5 to 9, 716 and 180 of them."""
    digits(out, range(5, 10))


def inked(out: str | os.PathLike) -> None:
    """Handwritten digits on photographs as `out/{train,val}/images/<index>.png`, 64x64, and their ink as `masks/`.

    480 and 120 of scikit-learn's digits, written 24 px wide in blue at a random place of a random crop of its two
    sample photographs: the left three quarters for training, the right quarter for validation. Always the same data.
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
    anywhere, moves one to three pixels per frame along either axis, and is reflected at the borders. Where two meet,
    the brighter one shows. Always the same data. The folder appears whole or not at all; an existing one is left as it
    is.
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


def beating(out: str | os.PathLike) -> None:
    """Clips of a beating shape over photographs: `out/{train,val}/{frames,masks}/<clip>/<frame>.png`, grey, 64 x 64.

    240 and 40 clips of ten frames. A shape of random outline, a brighter or darker piece of the same photograph, grows
    and shrinks around a centre that drifts. The mask does not include a second shape, which stands still. Speckle
    covers everything. Photographs of the validation set are not in the training set. Always the same data. The folder
    appears whole or not at all; an existing one is left as it is.
    """
    import numpy as np
    from PIL import Image

    side, frames = 64, 10
    y, x = np.mgrid[:side, :side] - side / 2 + 0.5

    def shape(centre, radius, stretch, bumps):
        """Whether each pixel lies in an outline around `centre`."""
        dy, dx = y - centre[0], (x - centre[1]) * stretch
        angle = np.arctan2(dy, dx)
        waves = sum(a * np.cos(k * angle + p) for k, (a, p) in enumerate(bumps, 2))
        return np.hypot(dy, dx) < radius * (1 + waves)

    def draw(rng, photo):
        """Frames and masks, uint8 (frames, side, side)."""
        top, left = (int(rng.integers(n - side + 1)) for n in photo.shape)
        patch = photo[top : top + side, left : left + side] / 255 * 0.5 + 0.2
        bumps, still = ([(rng.uniform(0, 0.12), rng.uniform(0, 6.3)) for _ in range(3)] for _ in range(2))
        centre, drift, stretch = rng.uniform(-10, 10, 2), rng.uniform(-0.6, 0.6, 2), rng.uniform(0.7, 1.4)
        radius, swing, phase, rate = (
            rng.uniform(11, 17),
            rng.uniform(0.12, 0.3),
            rng.uniform(0, 6.3),
            rng.uniform(0.4, 0.9),
        )
        shade = rng.uniform(0.12, 0.25) * rng.choice([-1, 1])
        corner = -np.sign(centre) * rng.uniform(18, 24, 2)
        other = shape(corner, rng.uniform(5, 8), 1, still)
        images, masks = [], []
        for t in range(frames):
            mask = shape(centre + t * drift, radius * (1 + swing * np.sin(phase + rate * t)), stretch, bumps)
            image = patch + shade * (mask | other)
            image = image * (1 + 0.08 * rng.standard_normal((side, side)))
            images.append((image.clip(0, 1) * 255).round().astype(np.uint8))
            masks.append(mask.astype(np.uint8) * 255)
        return images, masks

    def write(folder: Path) -> None:
        rng = np.random.default_rng(0)
        for part, count, photos in zip(("train", "val"), (240, 40), photographs(), strict=True):
            grey = [np.asarray(Image.fromarray(photo).convert("L")) for photo in photos.values()]
            for i in range(count):
                for kind, images in zip(("frames", "masks"), draw(rng, grey[rng.integers(len(grey))]), strict=True):
                    (folder / part / kind / f"{i:04d}").mkdir(parents=True)
                    for t, image in enumerate(images):
                        Image.fromarray(image).save(folder / part / kind / f"{i:04d}" / f"{t:02d}.png")

    _write_whole(Path(out), write)


def moving(out: str | os.PathLike) -> None:
    """Triplets of moving crops of photographs in Vimeo90K's layout: `out/sequences/<name>/im{1,2,3}.png`, 96 x 96.

    320 for training and 40 for testing (`tri_{train,test}list.txt`). The photograph moves by up to 4 pixels per frame,
    by fractions of a pixel. An ellipse with another part of it moves by up to 6 on its own. Both move exactly as far
    from the first frame to the middle as from there to the last. Photographs of the test set are not in the training
    set. Always the same data. The folder appears whole or not at all; an existing one is left as it is.
    """
    import numpy as np
    from PIL import Image
    from scipy.ndimage import map_coordinates

    side = 96
    y, x = np.mgrid[:side, :side].astype(float)

    def sample(photo, top, left):
        """A crop at a fractional pixel position."""
        row, column = int(top), int(left)
        near = photo[row - 6 : row + side + 8, column - 6 : column + side + 8].astype(float)
        at = [y + top - row + 6, x + left - column + 6]
        return np.stack([map_coordinates(near[..., c], at, order=3) for c in range(3)], -1)

    def triplet(rng, photo):
        """Three frames, uint8 (side, side, 3)."""
        room = np.array(photo.shape[:2]) - side - 30
        behind, before = (14 + rng.uniform(size=2) * room for _ in range(2))
        speeds = [rng.uniform(-most, most, 2) for most in (4, 6)]
        centre, radii = rng.uniform(30, side - 30, 2), rng.uniform(12, 24, 2)
        for t in (-1, 0, 1):
            place = centre + t * speeds[1]
            distance = np.hypot((y - place[0]) / radii[0], (x - place[1]) / radii[1])
            share = np.clip((1 - distance) * radii.min() + 0.5, 0, 1)[..., None]  # a soft edge of one pixel
            frame = sample(photo, *(behind - t * speeds[0])), sample(photo, *(before - t * speeds[1]))
            yield (frame[0] * (1 - share) + frame[1] * share).clip(0, 255).round().astype(np.uint8)

    def write(folder: Path) -> None:
        rng = np.random.default_rng(0)
        for part, count, photos in zip(("train", "test"), (320, 40), photographs(), strict=True):
            names = [f"{part}/{i:04d}" for i in range(count)]
            for name in names:
                (folder / "sequences" / name).mkdir(parents=True)
                photo = list(photos.values())[rng.integers(len(photos))]
                for i, frame in enumerate(triplet(rng, photo), 1):
                    Image.fromarray(frame).save(folder / "sequences" / name / f"im{i}.png")
            (folder / f"tri_{part}list.txt").write_text("\n".join(names) + "\n")

    _write_whole(Path(out), write)


def noisy(out: str | os.PathLike) -> None:
    """Grey photographs with Gaussian noise of sigma 25 (of 255), as `out/{train,val}/{input,target}/<name>.tif|png`.

    What scikit-learn and scikit-image ship: seven photographs for training, and 15 crops of 128 px from two others for
    validation. Targets are 8-bit PNGs, inputs float32 TIFFs with white at 1, so that the noise is not clipped. Always
    the same data. The folder appears whole or not at all; an existing one is left as it is.
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
        for part, targets in (("train", photos), ("val", crops(held_out))):
            for kind in ("input", "target"):
                (folder / part / kind).mkdir(parents=True)
            for name, target in targets.items():
                Image.fromarray(target).save(folder / part / "target" / f"{name}.png")
                noise = rng.normal(0, 25 / 255, target.shape)
                Image.fromarray((target / 255 + noise).astype(np.float32)).save(folder / part / "input" / f"{name}.tif")

    _write_whole(Path(out), write)


def photos(out: str | os.PathLike) -> None:
    """Colour photographs as `out/{train,val}/target/<name>.png`, to be shrunk for super-resolution.

    What scikit-learn and scikit-image ship: four photographs for training, and 12 crops of 128 px from two others for
    validation. Always the same data. The folder appears whole or not at all; an existing one is left as it is.
    """
    from PIL import Image

    def write(folder: Path) -> None:
        train, held_out = photographs()
        for part, pictures in (("train", train), ("val", crops(held_out))):
            (folder / part / "target").mkdir(parents=True)
            for name, photo in pictures.items():
                Image.fromarray(photo).save(folder / part / "target" / f"{name}.png")

    _write_whole(Path(out), write)


PATCH_CLASSES = ["astronaut", "brick", "camera", "chelsea", "china", "coffee", "flower", "grass", "gravel"]
PATCH_CLASSES += ["motorcycle"]


def patches(out: str | os.PathLike) -> None:
    """Crops of ten photographs as `out/{train,val}/<photograph>/<index>.png`, 32x32 grey: which one is it from?

    300 and 150 per photograph of scikit-learn's and scikit-image's, 24 to 48 px wide before they are resized. The
    photographs are cut into tiles of 64 px. Every fourth is for validation alone, so no pixel is in both parts. Always
    the same data. The folder appears whole or not at all; an existing one is left as it is.
    """
    import numpy as np
    from PIL import Image
    from skimage import data
    from sklearn.datasets import load_sample_images

    side = 64

    def write(folder: Path) -> None:
        rng = np.random.default_rng(0)
        found = dict(zip(("china", "flower"), load_sample_images().images, strict=True))
        found["motorcycle"] = data.stereo_motorcycle()[0]
        for name in PATCH_CLASSES:
            photo = Image.fromarray(found[name] if name in found else getattr(data, name)()).convert("L")
            rows, columns = photo.height // side, photo.width // side
            tiles = [(x, y) for y in range(rows) for x in range(columns)]
            for part, count in (("train", 300), ("val", 150)):
                mine = [tile for tile in tiles if ((tile[0] + 2 * tile[1]) % 4 == 0) == (part == "val")]
                (folder / part / name).mkdir(parents=True)
                for i in range(count):
                    (x, y), width = mine[rng.integers(len(mine))], int(rng.integers(24, 49))
                    left, top = (side * n + int(rng.integers(side - width + 1)) for n in (x, y))
                    crop = photo.crop((left, top, left + width, top + width))
                    crop.resize((32, 32), Image.BICUBIC).save(folder / part / name / f"{i:03d}.png")

    _write_whole(Path(out), write)


def photographs() -> "tuple[dict[str, np.ndarray], dict[str, np.ndarray]]":
    """Colour photographs (H, W, 3), uint8, from scikit-learn and scikit-image: for training, and held out."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    china, flower = load_sample_images().images
    train = {"china": china, "flower": flower, "astronaut": data.astronaut(), "rocket": data.rocket()}
    return train, {"coffee": data.coffee(), "chelsea": data.chelsea()}


def crops(photos: "dict[str, np.ndarray]") -> "dict[str, np.ndarray]":
    """All crops of 128 px, 160 px apart, by the photograph's name and their position."""
    return {
        f"{name}_{y:03d}_{x:03d}": photo[y : y + 128, x : x + 128]
        for name, photo in photos.items()
        for y in range(0, photo.shape[0] - 127, 160)
        for x in range(0, photo.shape[1] - 127, 160)
    }


def lumps(out: str | os.PathLike) -> None:
    """Volumes of ellipsoids in noise, as NIfTI files `out/{train,val}/{images,labels}/<index>.nii.gz`.

    24 and 8 volumes of 32 slices of 48 x 48 voxels, 2 mm between slices and 1 mm within. Each has one or two bright
    ellipsoids (class 1) and a dark one (class 2), apart from each other, in smooth noise with voxel noise over it.
    Always the same data. The folder appears whole or not at all; an existing one is left as it is.
    """
    import nibabel
    import numpy as np
    from scipy.ndimage import gaussian_filter

    spacing, size = np.array([2.0, 1.0, 1.0]), np.array([32, 48, 48])

    def write(folder: Path) -> None:
        rng = np.random.default_rng(0)
        grid = np.stack(np.meshgrid(*(np.arange(n) for n in size), indexing="ij"), -1) * spacing
        for part, count in (("train", 24), ("val", 8)):
            for name in ("images", "labels"):
                (folder / part / name).mkdir(parents=True)
            for i in range(count):
                label, shade = np.zeros(size, np.uint8), gaussian_filter(rng.normal(size=size), 4 / spacing)
                for kind in (1, 2, 1)[: rng.integers(2, 4)]:
                    radii, centre = rng.uniform(5, 10, 3), rng.uniform(0.25, 0.75, 3) * size * spacing
                    inside = (((grid - centre) / radii) ** 2).sum(-1) < 1
                    label[inside & (label == 0)] = kind
                image = 0.5 * shade / shade.std() + np.choose(label, [0.0, 1.5, -1.5]) + rng.normal(0, 0.5, size)
                affine = np.diag([*spacing[::-1], 1.0])
                for name, values in (("images", image.astype(np.float32)), ("labels", label)):
                    file = folder / part / name / f"{i:02d}.nii.gz"
                    nibabel.save(nibabel.Nifti1Image(values.transpose(2, 1, 0), affine), file)

    _write_whole(Path(out), write)


SCENE_CLASSES = ("photograph", *(str(digit) for digit in range(10)))


def scenes(out: str | os.PathLike) -> None:
    """Handwritten digits on photographs, for detection and segmentation: 400 images of 128 px and 80 held-out ones.

    Two to four of scikit-learn's digits, 32 to 48 px wide and in light colours, lie apart from each other on a crop, at
    half brightness, of a photograph from scikit-learn or scikit-image. Neither digits nor photographs of the
    validation set are in the training set. Always the same data. The folder appears whole or not at all; an existing
    one is left as it is.

    In ADE20K's layout: `images/{training,validation}/<index>.png` and, with the same names, label maps in
    `annotations/`: 0 unlabelled (a digit's blurred edge), 1 photograph, 2 to 11 digits. In COCO's layout:
    `{training,validation}.json` with boxes and masks (run lengths) of categories 1 to 10, named "0" to "9".
    """
    import json

    import numpy as np
    from PIL import Image
    from skimage import data
    from sklearn.datasets import load_digits, load_sample_images

    side = 128

    def run_lengths(mask) -> dict:
        """COCO's uncompressed run lengths, column by column, starting with zeros."""
        flat = np.concatenate([[0], mask.T.ravel(), [0]])
        starts = np.flatnonzero(np.diff(flat))
        return {"counts": np.diff([0, *starts, mask.size]).tolist(), "size": list(mask.shape)}

    def place(rng, sizes):
        """Corners (x, y) of squares of these sizes that do not overlap."""
        while True:
            corners = [tuple(int(v) for v in rng.integers(0, side - size + 1, 2)) for size in sizes]
            taken = np.zeros((side, side), int)
            for (x, y), size in zip(corners, sizes, strict=True):
                taken[y : y + size, x : x + size] += 1
            if taken.max() == 1:
                return corners

    def draw(rng, photo, digits, labels):
        """An image, its label map, and for each digit its class and mask."""
        x, y = (int(rng.integers(length - side + 1)) for length in photo.size)
        image = photo.crop((x, y, x + side, y + side)).point(lambda value: value // 2)
        ink = []
        chosen = rng.integers(len(labels), size=rng.integers(2, 5))
        sizes = rng.integers(32, 49, len(chosen)).tolist()
        for i, size, (x, y) in zip(chosen, sizes, place(rng, sizes), strict=True):
            digit = Image.fromarray((digits[i] * 255 / 16).round().astype("uint8")).resize((size, size), Image.BICUBIC)
            image.paste(tuple(rng.integers(186, 256, 3).tolist()), (x, y, x + size, y + size), digit)
            cover = np.zeros((side, side), np.uint8)
            cover[y : y + size, x : x + size] = np.asarray(digit)
            ink.append((int(labels[i]), cover))
        label_map = np.ones((side, side), np.uint8)
        for label, cover in ink:
            label_map[cover > 64] = 0
            label_map[cover > 127] = label + 2
        return image, label_map, [(label, cover > 127) for label, cover in ink]

    def write(folder: Path) -> None:
        china, flower = load_sample_images().images
        photos = {
            "training": [china, flower, data.astronaut(), data.rocket()],
            "validation": [data.coffee(), data.chelsea()],
        }
        digits, labels = load_digits(return_X_y=True)
        digits, rng = digits.reshape(-1, 8, 8), np.random.default_rng(0)
        for part, count, chosen in (("training", 400, slice(0, 1437)), ("validation", 80, slice(1437, None))):
            pictures = [Image.fromarray(photo) for photo in photos[part]]
            for kind in ("images", "annotations"):
                (folder / kind / part).mkdir(parents=True)
            coco = {"images": [], "annotations": []}
            coco["categories"] = [{"id": i, "name": name} for i, name in enumerate(SCENE_CLASSES) if i]
            for i in range(count):
                photo = pictures[rng.integers(len(pictures))]
                image, label_map, found = draw(rng, photo, digits[chosen], labels[chosen])
                image.save(folder / "images" / part / f"{i:04d}.png")
                Image.fromarray(label_map).save(folder / "annotations" / part / f"{i:04d}.png")
                coco["images"].append(dict(id=i, file_name=f"{i:04d}.png", width=side, height=side))
                for label, mask in found:
                    (top, bottom), (left, right) = (np.flatnonzero(mask.any(axis))[[0, -1]].tolist() for axis in (1, 0))
                    coco["annotations"].append(
                        dict(
                            id=len(coco["annotations"]) + 1,
                            image_id=i,
                            category_id=label + 1,
                            bbox=[left, top, right - left + 1, bottom - top + 1],
                            area=int(mask.sum()),
                            segmentation=run_lengths(mask),
                            iscrowd=0,
                        )
                    )
            (folder / f"{part}.json").write_text(json.dumps(coco))

    _write_whole(Path(out), write)


def _write_whole(out: Path, write: Callable[[Path], None]) -> None:
    """Call `write(folder)` on a temporary folder and move it to `out`, unless that exists."""
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


_MAKES = (beating, bouncing, digits, high_digits, inked, low_digits, lumps, moving, noisy, patches, photos, scenes)
MAKERS = {make.__name__: make for make in _MAKES}


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
