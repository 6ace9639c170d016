"""Write a small public data set as image folders: `python tools/make_data.py digits`."""

import argparse
import os
import shutil
import tempfile
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

    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    # Several training processes may start at once.
    with FileLock(out.parent / f".{out.name}.lock"):
        if out.exists():
            return
        for leftover in out.parent.glob(f".{out.name}-*"):
            shutil.rmtree(leftover)
        images, labels = load_digits(return_X_y=True)
        parts = train_test_split(range(len(labels)), test_size=360, stratify=labels, random_state=0)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        for part, indices in zip(("train", "val"), parts, strict=True):
            for i in indices:
                folder = temporary / part / str(labels[i])
                folder.mkdir(parents=True, exist_ok=True)
                pixels = (images[i].reshape(8, 8) * 255 / 16).round().astype("uint8")
                Image.fromarray(pixels).save(folder / f"{i:04d}.png")
        temporary.chmod(0o755)
        temporary.rename(out)


MAKERS = {"digits": digits}


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
