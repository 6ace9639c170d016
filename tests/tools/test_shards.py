"""Sets that timm's readers open: shards of WebDataset, and of Hugging Face an image folder on disk."""

import io
import json
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image
from test_resume import assert_same_end, killed

from linzoo.tools import finetune, test, train
from linzoo.tools.engine import InputError, TimmImages, TimmShards
from linzoo.tools.engine.data import prepare_data
from linzoo.tools.engine.runner import Runner
from linzoo.tools.engine.shards import count_samples, find_shards

CLASSES = ["dark", "grey", "light"]
LOAD = [dict(type="LoadImageFromFile"), dict(type="mmpretrain.PackInputs")]


def write_shards(folder: Path, images: Path, info: bool = True) -> Path:
    """The parts of an image folder as shards of five images, as WebDataset and img2dataset write them."""
    folder.mkdir()
    splits = {}
    for part, split in (("train", "train"), ("val", "validation")):
        files = sorted(images.glob(f"{part}/*/*.png"))
        random.Random(0).shuffle(files)
        names, lengths = [], []
        for i in range(0, len(files), 5):
            names.append(f"{split}-{i // 5}.tar")
            lengths.append(len(files[i : i + 5]))
            with tarfile.open(folder / names[-1], "w") as archive:
                for j, file in enumerate(files[i : i + 5], i):
                    label = CLASSES.index(file.parent.name)
                    for ending, content in (("png", file.read_bytes()), ("cls", str(label).encode())):
                        member = tarfile.TarInfo(f"{j:05}.{ending}")
                        member.size = len(content)
                        archive.addfile(member, io.BytesIO(content))
        splits[split] = dict(name=split, filenames=names, shard_lengths=lengths, num_samples=len(files))
    if info:
        (folder / "_info.json").write_text(json.dumps(dict(splits=splits)))
    return folder


@pytest.fixture
def shards(tmp_path, data):
    pytest.importorskip("webdataset")
    return write_shards(tmp_path / "shards", data)


def lines(name: str, root, train_split="train", val_split="validation", workers=0) -> str:
    kind = "TimmImages" if name.startswith("hfds/") else "TimmShards"
    common = f"type={kind!r}, name={name!r}, data_root={str(root) if root else None!r}"
    return f"""
train_dataloader.update(num_workers={workers})
train_dataloader["dataset"].update({common}, split={train_split!r}, data_prefix=None)
steps = [dict(type="LoadImageFromFile"), dict(type="PackInputs")]
for loader in (val_dataloader, test_dataloader):
    loader["dataset"] = dict({common}, split={val_split!r}, test_mode=True, pipeline=steps)
"""


def seen(dataset) -> list[tuple[int, int]]:
    """Class and a pixel sum of each image, in order."""
    return [(x["data_samples"].gt_label.item(), int(x["inputs"].sum())) for x in dataset]


def test_shards_hold_what_the_folder_holds(data, shards):
    read = TimmShards("wds/", "validation", str(shards), LOAD, test_mode=True, batch_size=4, num_workers=0)
    expected = {
        (CLASSES.index(file.parent.name), int(np.asarray(Image.open(file), dtype=int).sum()))
        for file in data.glob("val/*/*.png")
    }
    assert len(read) == 6 and set(seen(read)) == expected and len(seen(read)) == 6
    assert count_samples(find_shards(shards, "train")) == (15, 3)


def test_order_follows_from_seed_and_epoch(shards):
    def epochs(asked, seed=0):
        read = TimmShards("wds/", "train", str(shards), LOAD, batch_size=5, num_workers=0, seed=seed)
        orders = []
        for epoch in asked:
            read.set_epoch(epoch)
            orders.append(seen(read))
        return orders

    first, second, third = epochs([0, 1, 2])
    assert sorted(first) == sorted(second) and len(set(first)) == 15
    assert first != second != third
    assert epochs([2, 0]) == [third, first], "nothing of the passes before remains"
    assert epochs([0], seed=1) != [first]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_run_resumes_bit_equal(tmp_path, config, shards, workers):
    path = config(lines("wds/", shards, workers=workers))
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    train.main([path, "--work-dir", str(whole)])
    for epoch in (1, 2):
        killed([path, "--work-dir", str(torn), "--resume"], (torn / f"epoch_{epoch}.pth").exists)
    train.main([path, "--work-dir", str(torn), "--resume"])
    assert_same_end(whole, torn)


def test_validation_counts_every_image_once(tmp_path, config, shards, capsys):
    """As of the folder that the shards were made of."""
    folder, sharded = (
        config("train_cfg.update(max_epochs=1)\n", "folder.py"),
        config(lines("wds/", shards), "shards.py"),
    )
    train.main([folder, "--work-dir", str(tmp_path / "w")])
    weights = str(tmp_path / "w/export/model.safetensors")
    found = []
    for path in (folder, sharded):
        capsys.readouterr()
        test.main([path, weights])
        found.append(json.loads(capsys.readouterr().out.strip().splitlines()[-1])["accuracy/top1"])
    assert found[0] == found[1]


def test_hugging_face_folder(tmp_path, config, data, monkeypatch):
    """It is read by number, shuffled by the sampler, and gives the names of its classes to the export."""
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    name, cache = f"hfds/{data}", str(tmp_path / "cache")
    read = TimmImages(name, "train", cache, LOAD)
    assert read.metainfo["classes"] == ("dark", "grey", "light") and len(read) == 15
    assert [x[0] for x in seen(read[i] for i in range(15))] == [0] * 5 + [1] * 5 + [2] * 5
    path = config(lines(name, cache) + "train_cfg.update(max_epochs=1)\n")
    train.main([path, "--work-dir", str(tmp_path / "w")])
    facts = json.loads((tmp_path / "w/export/config.json").read_text())
    assert facts["label_names"] == CLASSES and facts["pretrained_cfg"]["input_size"] == [3, 32, 32]


@pytest.mark.parametrize("length", [dict(num_samples=15), dict(download=True)], ids=str)
def test_hugging_face_stream(tmp_path, config, data, monkeypatch, length):
    """From a folder on disk, directly or through the cache: the order follows from the epoch, and a model trains."""
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    name, cache = f"hfids/{data}", str(tmp_path / "cache")
    read = TimmShards(name, "train", cache, LOAD, batch_size=5, num_workers=0, **length)
    orders = []
    for epoch in (0, 1, 0):
        read.set_epoch(epoch)
        orders.append(seen(read))
    assert len(read) == len(set(orders[0])) == 15 and sorted(orders[0]) == sorted(orders[1])
    assert orders[0] == orders[2] != orders[1]
    if "num_samples" in length:
        with pytest.raises(InputError, match="1 shards for 2 readers; expected fewer workers"):
            TimmShards(name, "train", cache, LOAD, batch_size=5, num_workers=2, **length)
        with pytest.raises(InputError, match="Dataset length is unknown"):
            TimmShards(name, "train", cache, LOAD, batch_size=5, num_workers=0)
    more = f"train_dataloader['dataset'].update({length})\ntrain_cfg.update(max_epochs=1)\n"
    more += "for loader in (val_dataloader, test_dataloader):\n"
    more += f"    loader['dataset'].update({length | dict(num_samples=6)})\n"
    train.main([config(lines(name, cache) + more), "--work-dir", str(tmp_path / "w")])
    assert (tmp_path / "w/export/model.safetensors").exists()


def test_tensorflow_stream(tmp_path, config, data):
    """The order follows from the epoch; validation reads each image once; a model trains."""
    tfds = pytest.importorskip("tensorflow_datasets")
    parts = {"train": sorted(data.glob("train/*/*.png")), "validation": sorted(data.glob("val/*/*.png"))}
    rows = {
        part: [(i, dict(image=str(f), label=f.parent.name)) for i, f in enumerate(files)]
        for part, files in parts.items()
    }
    features = dict(image=tfds.features.Image(encoding_format="jpeg"), label=tfds.features.ClassLabel(names=CLASSES))
    tfds.dataset_builders.store_as_tfds_dataset(
        "levels", "1.0.0", data_dir=tmp_path, features=tfds.features.FeaturesDict(features), split_datasets=rows
    )
    read = TimmShards("tfds/levels", "train", str(tmp_path), LOAD, batch_size=5, num_workers=0)
    orders = []
    for epoch in (0, 1, 0):
        read.set_epoch(epoch)
        orders.append(seen(read))
    assert len(read) == 15 and orders[0] == orders[2] != orders[1] and read.metainfo["classes"] == tuple(CLASSES)
    read = TimmShards("tfds/levels", "validation", str(tmp_path), LOAD, test_mode=True, batch_size=4, num_workers=0)
    assert len(read) == 6 and sorted(label for label, _ in seen(read)) == [0, 0, 1, 1, 2, 2]
    train.main(
        [config(lines("tfds/levels", tmp_path) + "train_cfg.update(max_epochs=1)\n"), "--work-dir", str(tmp_path / "w")]
    )


@pytest.mark.parametrize("kind", ["wds", "hfds"])
def test_fine_tuning(tmp_path, data, kind, capsys, monkeypatch):
    """Classes, sizes and the recipe are found; what is missing is said before anything is written."""
    pytest.importorskip("webdataset")
    monkeypatch.setattr(pytest.importorskip("datasets").config, "HF_DATASETS_CACHE", tmp_path / "cache")
    place = write_shards(tmp_path / "shards", data, info=False) if kind == "wds" else data
    argv = ["test_byobnet", f"{kind}/{place}", "--epochs", "1", "--workers", "0", "--work-dir", str(tmp_path / "w")]
    finetune.main(argv)
    said = capsys.readouterr()
    names = "0, 1, 2" if kind == "wds" else "dark, grey, light"
    assert f"3 classes ({names}), 15 images to train on, 6 to validate on" in said.err
    assert "accuracy/top1" in said.out and "accuracy/top1" in (tmp_path / "w/report.html").read_text()
    cfg = Config.fromfile(tmp_path / "w/config.py")
    assert cfg.train_dataloader.dataset.type == ("TimmShards" if kind == "wds" else "TimmImages")
    for task, where, line in (("seg", place, "is for --task cls alone"), ("cls", tmp_path / "no", f"DATA '{kind}/")):
        with pytest.raises(SystemExit):
            finetune.main([*argv[:1], f"{kind}/{where}", "--task", task, "--work-dir", str(tmp_path / "v")])
        assert line in capsys.readouterr().err and not (tmp_path / "v").exists()


def check(path: str) -> None:
    prepare_data(Config.fromfile(path))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("wds/", "SHARDS", "absent"), "split absent not found in info"),
        (("wds/", "absent"), "data set 'wds/' in 'absent', split 'train'"),
        (("hfds/no/such folder", None), "data set 'hfds/no/such folder', split 'train': cannot be opened"),
    ],
)
def test_what_cannot_be_opened(config, shards, settings, said, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    settings = [str(shards) if value == "SHARDS" else value for value in settings]
    with pytest.raises(InputError, match=said):
        check(config(lines(*settings)))


def test_what_does_not_fit(config, data, shards, monkeypatch):
    path = config(lines("wds/", shards, workers=4))
    with pytest.raises(InputError, match="3 shards for 4 readers; expected fewer workers"):
        Runner.build_dataloader(Config.fromfile(path).train_dataloader, 0)
    with pytest.raises(InputError, match="how many images"):
        TimmShards("wds/", "validation-0.tar", str(shards), LOAD, test_mode=True, batch_size=4, num_workers=0)
    with pytest.raises(InputError, match="num_classes=3: 'wds/' has 2 classes"):
        more = lines("wds/", shards) + 'train_dataloader["dataset"].update(classes=["a", "b"])\n'
        check(config(more))
    (shards / "train-0.tar").write_bytes(b"no tar")
    with pytest.raises(InputError, match="train-0.tar.*expected images and .cls files in a tar"):
        count_samples(find_shards(shards, "train"))


def test_without_the_package(shards, config, monkeypatch):
    monkeypatch.setattr("timm.data.readers.reader_wds.wds", None)
    with pytest.raises(InputError, match="expected the package 'webdataset'"):
        check(config(lines("wds/", shards)))
