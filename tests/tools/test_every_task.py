"""What is common to all tasks: starts, checkpoints of other trainers, resumption, results, files as users have them."""

import errno
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from mmengine.fileio import LocalBackend
from PIL import Image, ImageOps
from tasks import CONFIGS, OF_IMAGES, WRAPPERS, write_task, write_weights
from test_bad_input import refused

from linzoo.tools import predict, test, train
from linzoo.tools.engine.config import load_config, task_of
from linzoo.tools.engine.resume import latest_checkpoint
from linzoo.tools.engine.task import build
from linzoo.tools.engine.weights import load_weights, read_checkpoint

TASKS = list(CONFIGS)
KEYS = ("mask", "drawn", "labels", "restored", "frames", "forecast")  # of results that name a file


class NeedsCode:
    """What a checkpoint may hold that only code reads."""


@pytest.fixture(params=TASKS)
def tiny(request, tmp_path):
    """Config, data and inputs of a task."""
    return write_task(request.param, tmp_path)


@pytest.fixture(params=OF_IMAGES)
def of_images(request, tmp_path):
    """Those of a task of images."""
    return write_task(request.param, tmp_path)


def results(out: Path) -> list[dict]:
    assert (out / "predictions.png").stat().st_size > 0
    return json.loads((out / "predictions.json").read_text())


def written(result: dict) -> list[str]:
    """The files that a result names."""
    masks = [found["mask"] for found in result.get("masks", [])]
    return masks + [result[key] for key in KEYS if key in result]


def run_predict(tiny, weights: Path, inputs: Path, out: Path) -> list[dict]:
    predict.main([tiny.config, str(weights), str(inputs), "--out", str(out), *tiny.options])
    return results(out)


# --- files to start from --------------------------------------------------------------------------------------------


def test_start_of_another_model(tiny, tmp_path, capsys):
    """Refused as on --resume, before anything is written."""
    torch.save({"state_dict": timm.create_model("vssd_m", num_classes=3).state_dict()}, tmp_path / "other.pth")
    option = f"load_from={tmp_path / 'other.pth'}"
    line = refused(capsys, train.main, tiny.config, "--work-dir", tmp_path / "w", "--cfg-options", option)
    assert "other.pth' does not fit" in line and "it fits 'vssd_m' with num_classes=3" in line
    for file in ("absent.pth", "torn.pth"):
        (tmp_path / "torn.pth").write_bytes(b"PK\x03\x04")
        option = f"load_from={tmp_path / file}"
        assert file in refused(capsys, train.main, tiny.config, "--work-dir", tmp_path / "w", "--cfg-options", option)
    assert not (tmp_path / "w").exists()


def test_checkpoints_of_other_trainers(tiny, tmp_path):
    """Prefixes, wrappers, averaged weights, half precision: the same weights are found in each."""
    expected = read_checkpoint(write_weights(tiny.config, tmp_path / "own.pth")).state
    cfg = load_config(tiny.config)
    for name, wrap in WRAPPERS.items():
        file = write_weights(tiny.config, tmp_path / f"{name}.pth", wrap)
        model = task_of(cfg).weights(build(cfg))
        load_weights(model, file)
        for key, value in model.state_dict().items():
            torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-3 if name == "half" else 0, msg=name)


def test_start_from_another_trainers_checkpoint(tiny, tmp_path, capsys):
    """`load_from` takes what test and predict take; the averaged weights are said, the last ones can be had."""
    file = write_weights(tiny.config, tmp_path / "start.pth", WRAPPERS["averaged"])
    options = [
        "--cfg-options",
        f"load_from={file}",
        "optim_wrapper.optimizer.lr=0",
        "optim_wrapper.optimizer.weight_decay=0",
    ]
    train.main([tiny.config, "--work-dir", str(tmp_path / "w"), *options])
    assert "has averaged weights (model_ema), which are taken; for the last ones give" in capsys.readouterr().err
    started, ended = read_checkpoint(file).state, read_checkpoint(tmp_path / "w/epoch_1.pth").state
    learnt = {
        name
        for name, _ in task_of(load_config(tiny.config)).weights(build(load_config(tiny.config))).named_parameters()
    }
    for key in learnt:
        assert torch.equal(started[key], ended[key]), key
    last = read_checkpoint(f"{file}#model").state
    assert all((value == 0).all() for value in last.values())


def test_averages_start_from_the_file(tmp_path):
    """`load_from` reaches the copy that an EMAHook keeps, too."""
    tiny = write_task("classification", tmp_path)
    file, config = write_weights(tiny.config, tmp_path / "start.pth"), Path(tiny.config)
    config.write_text(
        config.read_text() + f"default_hooks = dict(ema=dict(type='EMAHook'))\nload_from = {str(file)!r}\n"
    )
    still = ["optim_wrapper.optimizer.lr=0", "optim_wrapper.optimizer.weight_decay=0"]
    train.main([tiny.config, "--work-dir", str(tmp_path / "w"), "--cfg-options", *still])
    started, ended = read_checkpoint(file).state, read_checkpoint(tmp_path / "w/epoch_1.pth").state
    assert all(torch.allclose(started[key], ended[key]) for key in started if key.endswith("fc.weight"))
    test.main([tiny.config, str(tmp_path / "w/export/model.safetensors")])


def test_checkpoint_that_needs_code(tiny, tmp_path, capsys):
    """One line: what was found, how to convert it."""
    file = tmp_path / "code.pth"
    write_weights(tiny.config, file, lambda state: {"state_dict": state, "config": NeedsCode()})
    said = r"holds a \S*NeedsCode, which only running foreign code reads; .* torch.save\("
    assert re.search(said, refused(capsys, test.main, tiny.config, file))
    out = tmp_path / "out"
    assert re.search(said, refused(capsys, predict.main, tiny.config, file, tiny.inputs, "--out", out, *tiny.options))
    option = f"load_from={file}"
    assert re.search(said, refused(capsys, train.main, tiny.config, "--work-dir", out, "--cfg-options", option))
    assert not out.exists()


def test_another_number_of_classes(tmp_path, capsys):
    """A classifier's and a segmenter's head begin anew, which is said; the rest is the file's."""
    for task, option, head in (
        ("classification", "model.pretrained", "head.fc"),
        ("classification", "load_from", "head.fc"),
        ("label maps", "load_from", "decode_head.conv_seg"),
    ):
        folder = tmp_path / f"{task} {option}"
        folder.mkdir()
        tiny, five = write_task(task, folder), folder / "five.py"
        text = Path(tiny.config).read_text()
        five.write_text(text.replace("num_classes=3", "num_classes=5"))
        file = write_weights(str(five), folder / "five.pth")
        lr = "optim_wrapper.optimizer.lr=0"
        train.main([tiny.config, "--work-dir", str(folder / "w"), "--cfg-options", f"{option}={file}", lr])
        assert f"begin anew: {head if task == 'classification' else 'auxiliary_head'}" in capsys.readouterr().err
        started, ended = read_checkpoint(file).state, read_checkpoint(folder / "w/epoch_1.pth").state
        assert len(ended[f"{head}.weight"]) == 3 and len(started[f"{head}.weight"]) == 5
        convolutions = [key for key, value in started.items() if value.ndim == 4 and "conv_seg" not in key]
        decay = 1 - 1e-3
        assert all(torch.allclose(started[key], ended[key], rtol=1 - decay) for key in convolutions)


@pytest.mark.parametrize("tag", ["", ".no_such_tag"])
def test_weights_that_are_not_published(tiny, tmp_path, capsys, tag):
    """Said before anything is written, whatever holds the timm model."""
    text, other, cfg = Path(tiny.config).read_text(), tmp_path / "other.py", load_config(tiny.config)
    holder = "backbone" if "backbone" in cfg.model else "model"
    name = (
        cfg.model.get("model_name", "test_convnext")
        .replace("test_byobnet", "vssd_m")
        .replace("test_convnext", "vssd_m")
    )
    other.write_text(f"{text}\n{holder}.update(model_name='{name}{tag}', pretrained=True)\n")
    line = refused(capsys, train.main, other, "--work-dir", tmp_path / "w")
    where = "config key model.backbone" if holder == "backbone" else "config key model"
    assert where in line and ("Invalid pretrained tag" in line or "are published; expected a file" in line)
    assert not (tmp_path / "w").exists()


# --- resumption -----------------------------------------------------------------------------------------------------


def test_resume_with_other_settings(tiny, tmp_path, capsys):
    """What the checkpoint keeps and what the config changes is said; what cannot go on is refused in one line."""
    work_dir, lr = tmp_path / "w", load_config(tiny.config).optim_wrapper.optimizer.lr
    train.main([tiny.config, "--work-dir", str(work_dir)])
    capsys.readouterr()
    resumed = [tiny.config, "--work-dir", str(work_dir), "--resume", "--cfg-options", "train_cfg.max_epochs=2"]
    train.main([*resumed, "optim_wrapper.optimizer.lr=7e-5"])
    said = capsys.readouterr().err
    assert f"--resume: optim_wrapper.optimizer.lr is 7e-05 and was {lr}: {lr} is used" in said
    assert "--resume: train_cfg.max_epochs is 2 and was 1: 2 is used" in said
    checkpoint = torch.load(work_dir / "epoch_2.pth", weights_only=False)
    assert max(group["lr"] for group in checkpoint["optimizer"]["param_groups"]) == lr
    before = {path.name: path.stat().st_mtime_ns for path in work_dir.rglob("*")}
    other, text = Path(tiny.config).with_name("other.py"), Path(tiny.config).read_text()
    for line, name in (
        (
            "optim_wrapper = dict(_delete_=True, optimizer=dict(type='SGD', lr=1e-3))",
            r"optim_wrapper\.(optimizer\.type is 'SGD'|constructor is None) and was",
        ),
        ("param_scheduler = [dict(type='ConstantLR', factor=0.5)]", "param_scheduler"),
        ("custom_hooks = [dict(type='EMAHook')]", r"custom_hooks\.0\.type is 'EMAHook' and was None"),
    ):
        if "_delete_" in line and "optim_wrapper" in text:
            line = line.replace("_delete_=True, ", "")
        other.write_text(f"{text}\n{line}\n")
        assert re.search(f"--resume: {name}", refused(capsys, train.main, other, *resumed[1:4]))
    assert before == {path.name: path.stat().st_mtime_ns for path in work_dir.rglob("*")}


def test_resume_with_other_classes(tmp_path, capsys):
    tiny = write_task("classification", tmp_path)
    train.main([tiny.config, "--work-dir", str(tmp_path / "w")])
    for part in ("train", "val"):
        (tmp_path / "data" / part / "c").rename(tmp_path / "data" / part / "A")
    line = refused(capsys, train.main, tiny.config, "--work-dir", tmp_path / "w", "--resume")
    assert "the classes are ['A', 'a', 'b'] and were ['a', 'b', 'c']" in line


def test_resume_without_the_start_file(tmp_path, capsys):
    """The checkpoint has the weights, so the file that the run once started from may be gone."""
    tiny = write_task("classification", tmp_path)
    start = write_weights(tiny.config, tmp_path / "start.pth")
    options = ["--work-dir", str(tmp_path / "w"), "--resume", "--cfg-options", f"model.pretrained={start}"]
    train.main([tiny.config, *options])
    start.unlink()
    train.main([tiny.config, *options, "train_cfg.max_epochs=2"])
    assert f"pretrained={str(start)!r} is gone; the weights are those of" in capsys.readouterr().err
    assert (tmp_path / "w" / "epoch_2.pth").exists()


# --- writing --------------------------------------------------------------------------------------------------------


def test_two_inputs_of_one_stem(tiny, tmp_path):
    """Each has a result of its own."""
    weights = write_weights(tiny.config, tmp_path / "w.pth")
    source = sorted(tiny.inputs.iterdir())[0] if tiny.inputs.is_dir() else tiny.inputs
    if source.is_dir():
        return  # a folder of frames has no ending
    folder = tmp_path / "twins"
    names = {Path(end).suffix: (f"a/{end}", f"b/{end}") for end in ("x.bin", "x.npy", "x.nii.gz", "x.csv")}
    for name in names.get(source.suffix, ("x.png", "x.bmp", "X.tif")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if source.suffix in names:
            (folder / name).write_bytes(source.read_bytes())
        else:
            Image.open(source).save(folder / name)
    found = run_predict(tiny, weights, folder, tmp_path / "out")
    files = [file for result in found for file in written(result)]
    assert len({file.casefold() for file in files}) == len(files) and all(Path(file).is_file() for file in files)
    assert (
        len({result["path"] for result in found})
        == len(found)
        == len(list(folder.rglob("x.*")) + list(folder.glob("X.*")))
    )


def test_results_are_no_inputs(of_images, tmp_path):
    """What an earlier call wrote below the folder of images is not predicted again."""
    weights = write_weights(of_images.config, tmp_path / "w.pth")
    first = run_predict(of_images, weights, of_images.inputs, of_images.inputs / "out")
    assert run_predict(of_images, weights, of_images.inputs, of_images.inputs / "out") == first


def test_failed_write(tiny, tmp_path, capsys, monkeypatch):
    """A full disk: one line, no half file, the checkpoint before is kept and resumed from."""
    work_dir, options = tmp_path / "w", ["--cfg-options", "train_cfg.max_epochs=3"]

    def fails(self, content, file):
        Path(file).write_bytes(content[:1000] if "epoch_2" in str(file) else content)
        if "epoch_2" in str(file):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(LocalBackend, "put", fails)
    line = refused(capsys, train.main, tiny.config, "--work-dir", work_dir, *options)
    assert "epoch_2.pth' (No space left on device)" in line and line.endswith(
        "--resume goes on from " + str(work_dir / "epoch_1.pth")
    )
    assert not list(work_dir.glob(".*")) and not (work_dir / "epoch_2.pth").exists()
    assert latest_checkpoint(work_dir).name == "epoch_1.pth"
    monkeypatch.undo()
    train.main([tiny.config, "--work-dir", str(work_dir), "--resume", *options])
    assert latest_checkpoint(work_dir).name == "epoch_3.pth"


def test_half_checkpoint(tmp_path, capsys):
    """One that a copy cut off is passed over, aloud, for the one before."""
    tiny = write_task("classification", tmp_path)
    work_dir, options = tmp_path / "w", ["--cfg-options", "train_cfg.max_epochs=2"]
    train.main([tiny.config, "--work-dir", str(work_dir), *options])
    os.truncate(work_dir / "epoch_2.pth", 1000)
    capsys.readouterr()
    train.main([tiny.config, "--work-dir", str(work_dir), "--resume", *options])
    assert "epoch_2.pth' cannot be read" in capsys.readouterr().err
    assert len(read_checkpoint(work_dir / "epoch_2.pth").state) > 0


def test_failed_write_of_results(of_images, tmp_path, capsys, monkeypatch):
    weights, saved = write_weights(of_images.config, tmp_path / "w.pth"), Image.Image.save

    def fails(self, file, *args, **kwargs):
        saved(self, file, *args, **kwargs)
        os.truncate(file, 10)
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(Image.Image, "save", fails)
    out = tmp_path / "out"
    argv = [of_images.config, weights, of_images.inputs, "--out", out, *of_images.options]
    if "Classifier" in Path(of_images.config).read_text():
        monkeypatch.undo()
        out.mkdir()
        (out / "predictions.json").mkdir()
        assert "cannot write" in refused(capsys, predict.main, *argv)
    else:
        assert "Disk quota exceeded" in refused(capsys, predict.main, *argv)
    assert not [path for path in out.rglob("*") if path.is_file()]


# --- images as users have them ------------------------------------------------------------------------------------


def turned(source: Path, target: Path) -> None:
    """A photograph as a phone held upright writes it: its pixels on the side, and an EXIF tag that says so."""
    image = Image.open(source).convert("RGB")
    exif = image.getexif()
    exif[0x0112] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(target, exif=exif, quality=100, subsampling=0)


def test_turned_photographs(of_images, tmp_path):
    """Upright from reading to drawing: results are as of the upright image, and have its size."""
    weights = write_weights(of_images.config, tmp_path / "w.pth")
    source, folder = of_images.inputs / "0.png", tmp_path / "turned"
    folder.mkdir()
    turned(source, folder / "photo.jpg")
    [found] = run_predict(of_images, weights, folder, tmp_path / "out")
    for file in written(found):
        assert Image.open(file).size == (48, 32), file
    upright = tmp_path / "upright"
    upright.mkdir()
    ImageOps.exif_transpose(Image.open(folder / "photo.jpg")).save(upright / "photo.png")
    [expected] = run_predict(of_images, weights, upright, tmp_path / "expected")
    if "objects" in found:  # which are drawn in colours by chance
        boxes = [[entry["box"] for entry in result["objects"]] for result in (found, expected)]
        np.testing.assert_allclose(*boxes, atol=1e-3)
        return
    for ours, theirs in zip(written(found), written(expected), strict=True):
        assert np.array_equal(np.asarray(Image.open(ours)), np.asarray(Image.open(theirs)))
    if "label" in found:
        assert found["confidence"] == pytest.approx(expected["confidence"])


def test_training_on_turned_photographs(of_images, tmp_path, capsys):
    """Masks, maps, targets and boxes lie on the upright image; for one that lies on its side they are refused."""
    name = sorted(of_images.images.glob("*.png"))[1]
    image = Image.open(name)
    turned(name, name.with_suffix(".jpg"))
    name.write_bytes(name.with_suffix(".jpg").read_bytes())  # a name's ending tells Pillow nothing
    name.with_suffix(".jpg").unlink()
    train.main([of_images.config, "--work-dir", str(tmp_path / "w")])
    if of_images.others is None:
        return
    beside = of_images.others / name.name
    rotated = Image.open(beside).transpose(Image.Transpose.ROTATE_90)
    rotated.save(beside)
    line = refused(capsys, train.main, of_images.config, "--work-dir", tmp_path / "w2")
    assert name.name in line and (f"{image.size[0]} x {image.size[1]}" in line or "64 x 48" in line)
    assert not (tmp_path / "w2").exists()


def kinds(rgb: np.ndarray) -> dict:
    """How cameras, microscopes and editors save an image: `{file: image}`."""
    grey, image = rgb.mean(2) / 255, Image.fromarray(rgb)
    return {
        "float.tif": Image.fromarray(grey.astype(np.float32)),
        "sixteen.png": Image.fromarray((grey * 65535).astype(np.uint16)),
        "cmyk.jpg": image.convert("CMYK"),
        "alpha.png": image.convert("RGBA"),
        "grey_alpha.png": image.convert("LA"),
        "one.bmp": image.convert("1"),
        "palette.gif": image.convert("P"),
        "camera.jfif": image,
    }


def test_kinds_of_files(of_images, tmp_path):
    """Read alike by the check, the pipeline and the drawing."""
    weights = write_weights(of_images.config, tmp_path / "w.pth")
    folder, rgb = tmp_path / "kinds", np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8)
    folder.mkdir()
    for name, image in kinds(rgb).items():
        image.save(folder / name, **({"format": "jpeg"} if name.endswith("jfif") else {}))
    found = run_predict(of_images, weights, folder, tmp_path / "out")
    assert sorted(Path(result["path"]).name for result in found) == sorted(kinds(rgb))
    assert all(Path(file).is_file() for result in found for file in written(result))


@pytest.mark.parametrize(
    ("name", "said"),
    [("stack.tif", "holds 2 images; expected one a file"), ("wide.tif", "holds floats from 0 to 900; expected 0 to 1")],
)
def test_kinds_that_are_refused(of_images, tmp_path, capsys, name, said):
    """Not read in part, and not scaled by a guess."""
    if name == "wide.tif" and "Restore" in Path(of_images.config).read_text().title():
        pytest.skip("restoration takes floats as they are")
    weights, folder = write_weights(of_images.config, tmp_path / "w.pth"), tmp_path / "kinds"
    folder.mkdir()
    page = Image.new("L", (48, 32), 90)
    if name == "stack.tif":
        page.save(folder / name, save_all=True, append_images=[page])
    else:
        Image.fromarray(np.linspace(0, 900, 32 * 48, dtype=np.float32).reshape(32, 48)).save(folder / name)
    argv = of_images.config, weights, folder, "--out", tmp_path / "out", *of_images.options
    line = refused(capsys, predict.main, *argv)
    assert name in line and said in line
    assert not (tmp_path / "out").exists()


def test_files_that_are_left_out(of_images, tmp_path, capsys):
    """Counted aloud, in training and in prediction; hidden ones are none of anybody's."""
    hidden = of_images.images / ".ipynb_checkpoints"
    hidden.mkdir()
    (of_images.images.parent / ".ipynb_checkpoints").mkdir()
    (hidden / "0-checkpoint.png").write_bytes(b"")
    for folder in (of_images.images, of_images.inputs):
        (folder / "photo.heic").write_bytes(b"")
        (folder / ".DS_Store").write_bytes(b"")
    train.main([of_images.config, "--work-dir", str(tmp_path / "w")])
    if "coco" not in str(of_images.images):  # there the annotations name the images
        assert "1 files in" in capsys.readouterr().err
    weights = write_weights(of_images.config, tmp_path / "w.pth")
    assert len(run_predict(of_images, weights, of_images.inputs, tmp_path / "out")) == 2
    assert "left out, such as 'photo.heic'" in capsys.readouterr().err


# --- masks and label maps ---------------------------------------------------------------------------------------------


def palette(mask: np.ndarray) -> Image.Image:
    """Indices under colours of which none is grey."""
    image = Image.fromarray(mask, "P")
    image.putpalette([200, 10, 10, 10, 200, 10, 10, 10, 200])
    return image


MAPS = {
    "indices": (lambda m: Image.fromarray(m), None),
    "palette": (palette, None),
    "1 bit": (lambda m: Image.fromarray(m * 255).convert("1"), None),
    "grey as RGB": (lambda m: Image.fromarray(m).convert("RGB"), None),
    "16 bit": (lambda m: Image.fromarray(m.astype(np.uint16)), None),
    "colours": (lambda m: palette(m).convert("RGB"), r"is in colour or floats \(RGB\); expected one index a pixel"),
    "RGBA of small values": (
        lambda m: Image.fromarray(np.dstack([m, m, m, m * 0 + 1])),
        r"in colour or floats \(RGBA\)",
    ),
    "another size": (lambda m: Image.fromarray(m).resize((40, 32)), "is 40 x 32; expected 48 x 32 as its image"),
    "large values": (lambda m: Image.fromarray(m.astype(np.uint16) * 300), "holds the value 300; expected at most 255"),
    "odd values": (lambda m: Image.fromarray(m * 7), "holds the (value|label) 7; expected"),
}


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("task", ["segmentation", "label maps"])
def test_maps_as_annotators_save_them(task, kind, tmp_path, capsys):
    """Trained as meant, or one line that names the first file, before anything is written."""
    tiny, (save, said) = write_task(task, tmp_path), MAPS[kind]
    for file in sorted(tiny.others.iterdir()):
        mask = (np.asarray(Image.open(file)) > 0).astype(np.uint8)
        save(mask).save(file)
    argv = tiny.config, "--work-dir", tmp_path / "w"
    if said is None:
        train.main([str(a) for a in argv])
        return
    line = refused(capsys, train.main, *argv)
    assert re.search(said, line) and str(min(tiny.others.iterdir())) in line
    assert not (tmp_path / "w").exists()


def test_maps_of_0_and_255(tmp_path, capsys):
    """For a mask they are meant; for label maps 255 is nothing to learn."""
    tiny = write_task("label maps", tmp_path)
    for folder in (tiny.others, tiny.others.with_name("val")):
        for file in folder.iterdir():
            Image.fromarray((np.asarray(Image.open(file)) > 0).astype(np.uint8) * 255).save(file)
    line = refused(capsys, train.main, tiny.config, "--work-dir", tmp_path / "w")
    assert "hold the labels [0, 255] alone; expected two of the 3 classes' at least" in line
    assert not (tmp_path / "w").exists()


def test_hidden_folder_of_a_data_set_of_mmseg(tmp_path, capsys):
    """Its own data sets read what an editor's hidden folder holds: that is refused."""
    tiny = write_task("label maps", tmp_path)
    config = Path(tiny.config)
    text = config.read_text().replace("make=None, reduce_zero_label", 'type="BaseSegDataset", reduce_zero_label')
    config.write_text(text.replace("dataset=dict(", 'dataset=dict(_delete_=True, img_suffix=".png", '))
    (tiny.images / ".ipynb_checkpoints").mkdir()
    (tiny.images / "._a.png").touch()  # hidden files mmseg leaves out itself
    train.main([tiny.config, "--work-dir", str(tmp_path / "before")])
    first = min(tiny.images.glob("[!.]*.png"))
    (tiny.images / ".ipynb_checkpoints" / "a-checkpoint.png").write_bytes(first.read_bytes())
    line = refused(capsys, train.main, tiny.config, "--work-dir", tmp_path / "w")
    assert "BaseSegDataset would read" in line and "a-checkpoint.png' of a hidden folder; remove the folder" in line
    assert not (tmp_path / "w").exists()
