"""Train GroupMamba-T on handwritten digits and label digits it has not seen. `make quickstart` runs this."""

import argparse
import json
from pathlib import Path

from linzoo.tools import predict, train

CONFIG = str(Path(__file__).resolve().parent.parent / "configs/cls/groupmamba_t_digits.py")
WORK_DIR = Path("work_dirs/quickstart")


def main(argv: list[str] | None = None) -> None:
    """Command line of `quickstart`. An interrupted run continues; a finished one only predicts."""
    argparse.ArgumentParser(description=__doc__).parse_args(argv)
    train.main([CONFIG, "--work-dir", str(WORK_DIR), "--resume"])
    model = WORK_DIR / "export/model.safetensors"
    predict.main([CONFIG, str(model), "data/digits/val", "--out", str(WORK_DIR)])
    top1 = json.loads((WORK_DIR / "export/config.json").read_text())["top1"]
    print(f"model:     {model.parent} (timm loads it: local-dir:{model.parent})")
    print(f"curves:    {WORK_DIR / 'curves.png'}")
    print(f"accuracy:  {top1:.2f} % of 360 held-out digits")
    print(f"Remove {WORK_DIR} to train again.")


if __name__ == "__main__":
    main()
