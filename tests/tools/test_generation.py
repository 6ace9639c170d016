"""Images of classes: latents, losses, samples by seeds, the judge, resumption, bad input."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tasks import write_task, write_weights
from test_bad_input import refused
from test_resume import checkpoint, killed

pytest.importorskip("torchdiffeq")

from linzoo.tools import cli, predict, test, train  # noqa: E402
from linzoo.tools.engine import FlowMatching, GenerationMetric, InputError, NextScale  # noqa: E402
from linzoo.tools.engine.generation import Judge, drop_labels  # noqa: E402

MINI = dict(model_name="dimsum_b_2", hidden_size=32, depth=1, num_classes=3)
BOTH = ("flow", "next scale")


@pytest.fixture(params=BOTH)
def tiny(request, tmp_path):
    return write_task(request.param, tmp_path)


def vae(folder: Path, channels: int = 4) -> str:
    """A tiny AutoencoderKL that halves images once."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(3)
    model = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=channels,
    )  # fmt: skip
    model.save_pretrained(folder)
    return str(folder)


def pictures(folder: Path) -> dict[str, np.ndarray]:
    return {file.name: np.asarray(Image.open(file)) for file in sorted((folder / "images").iterdir())}


def test_samples_by_seeds(tiny, tmp_path, capsys):
    """The same files in every run; one image alone is as among others; another seed, another image."""
    weights = str(write_weights(tiny.config, tmp_path / "w.pth"))
    argv = ["sample", tiny.config, weights, "--classes", "2", "0", "--count", "3", "--seed", "5"]
    for name in ("one", "two"):
        assert cli.main([*argv, "--out", str(tmp_path / name)]) is None
    one, two = (pictures(tmp_path / name) for name in ("one", "two"))
    assert [*one] == [f"{c:04d}_{5 + i:06d}.png" for c, i in ((0, 3), (0, 4), (0, 5), (2, 0), (2, 1), (2, 2))]
    assert all(np.array_equal(one[name], two[name]) for name in one)
    results = json.loads((tmp_path / "one/predictions.json").read_text())
    assert [(r["class"], r["seed"]) for r in results] == [("2", 5), ("2", 6), ("2", 7), ("0", 8), ("0", 9), ("0", 10)]
    alone = ["--classes", "0", "--count", "1", "--seed", "9", "--out", str(tmp_path / "three")]
    predict.main([tiny.config, weights, *alone])
    np.testing.assert_allclose(pictures(tmp_path / "three")["0000_000009.png"], one["0000_000009.png"], atol=1)
    assert not np.array_equal(one["0000_000008.png"], one["0000_000009.png"])
    assert (tmp_path / "one/predictions.png").stat().st_size > 0


def test_train_test_and_names(tiny, tmp_path, capsys):
    """Metrics are there; classes have the folders' names."""
    train.main([tiny.config, "--work-dir", str(tmp_path / "w")])
    weights = str(tmp_path / "w/epoch_1.pth")
    capsys.readouterr()
    test.main([tiny.config, weights])
    first = capsys.readouterr().out.splitlines()[-1]
    names = {f"generate/{name}" for name in ("FID", "IS", "accuracy", "accuracy_of_real")}
    assert names <= json.loads(first).keys()
    test.main([tiny.config, weights])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == pytest.approx(json.loads(first))
    predict.main([tiny.config, weights, "--classes", "b", "--count", "1", "--out", str(tmp_path / "out")])
    assert json.loads((tmp_path / "out/predictions.json").read_text())[0]["class"] == "b"


def test_command_line_goes_before_the_config(tmp_path):
    """Sampler, steps and guidance change the images of a flow, top-k those of a next-scale model."""
    for task, options in (("flow", ("--steps 3", "--sampler euler", "--guidance 3")), ("next scale", ("--top-k 1",))):
        (tmp_path / task).mkdir()
        tiny, found = write_task(task, tmp_path / task), []
        weights = str(write_weights(tiny.config, tmp_path / task / "w.pth"))
        state = torch.load(weights)["state_dict"]
        torch.manual_seed(0)
        torch.save({k: torch.randn_like(v) * 0.2 if v.is_floating_point() else v for k, v in state.items()}, weights)
        for i, option in enumerate(("", *options)):
            out = tmp_path / task / str(i)
            argv = [tiny.config, weights, "--classes", "1", "--count", "1", "--out", str(out), *option.split()]
            predict.main(argv)
            found.append(pictures(out)["0001_000000.png"])
        assert all(not np.array_equal(found[0], other) for other in found[1:]), task


def test_latents(tmp_path):
    """The loss is of scaled latents; samples pass the decoder; the VAE is in no state dict and does not learn."""
    torch.manual_seed(0)
    task = FlowMatching(**MINI, img_resolution=8, steps=1, sampler="euler", vae=dict(pretrained=vae(tmp_path / "vae")))
    assert task.vae.scale == pytest.approx(0.18215)
    assert not [key for key in task.state_dict() if "vae" in key]
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    latents = task.vae.encode(images)
    assert latents.shape == (2, 4, 8, 8)
    ours = task.vae.frozen.model
    torch.manual_seed(1)
    expected = ours.encode(images).latent_dist.sample() * 0.18215
    torch.manual_seed(1)
    torch.testing.assert_close(task.vae.encode(images), expected)
    torch.testing.assert_close(task.vae.decode(latents), ours.decode(latents / 0.18215).sample)
    task.losses(images, torch.tensor([0, 1]))["loss"].backward()
    assert task.model.patch_embed.weight.grad is None or task.model.head.weight.grad is not None
    assert all(p.grad is None for p in ours.parameters())
    assert task.sample(torch.tensor([1, 2]), [3, 4]).shape == (2, 3, 16, 16)


def test_first_loss():
    """The model begins with velocity 0, so the loss is the mean square of the target: 1 + 1/3 (of images in
    [-1, 1]) by the linear path, (pi / 2)^2 times half of it by the trigonometric one."""
    for path, expected in (("linear", 4 / 3), ("gvp", (torch.pi / 2) ** 2 * 2 / 3)):
        torch.manual_seed(0)
        task = FlowMatching(**MINI, img_resolution=8, in_channels=3, path=path)
        images = torch.rand(2000, 3, 8, 8) * 2 - 1
        loss = task.losses(images, torch.zeros(2000, dtype=torch.long))["loss"]
        assert loss.item() == pytest.approx(expected, rel=0.03)


def test_drop_labels():
    y = torch.ones(4000, dtype=torch.long)
    assert (drop_labels(y, 7, 0.25) == 7).float().mean() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(drop_labels(y, None, 0.25), y) and torch.equal(drop_labels(y, 7, 0.0), y)


def test_first_loss_of_codes(tmp_path):
    """The head begins near 0: every code is as likely."""
    from linzoo.tools.engine.config import load_config
    from linzoo.tools.engine.task import build

    task = build(load_config(write_task("next scale", tmp_path).config))
    loss = task.losses(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 0]))["loss"]
    assert loss.item() == pytest.approx(np.log(16), abs=0.05)
    assert not [key for key in task.state_dict() if "tokenizer" in key]


def test_judge_and_metric(tmp_path):
    """Real images beside themselves: no distance, and every class is seen; shuffled classes are not."""
    rng = np.random.default_rng(0)
    for name, level in (("dark", 30), ("grey", 120), ("light", 220)):
        (tmp_path / name).mkdir()
        for i in range(20):
            pixels = rng.integers(level, level + 30, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    state = torch.get_rng_state()
    images, labels = [], []
    for label, name in enumerate(("dark", "grey", "light")):
        for file in sorted((tmp_path / name).iterdir()):
            images.append(torch.from_numpy(np.asarray(Image.open(file))).expand(3, 8, 8) / 255)
            labels.append(torch.tensor([label]))

    def measure(labels):
        metric = GenerationMetric(judge=str(tmp_path))
        rows = zip(images, labels, strict=True)
        metric.process({}, [{"generated": x, "real": x, "gt_label": y} for x, y in rows])
        return metric.compute_metrics(metric.results)

    found = measure(labels)
    assert found["accuracy"] == found["accuracy_of_real"] == 100 and abs(found["FID"]) < 1e-2
    assert 2 < found["IS"] <= 3.01
    assert measure(labels[20:] + labels[:20])["accuracy"] == 0
    assert torch.equal(state, torch.get_rng_state()), "a run's random stream is left alone"
    features, logits = Judge(tmp_path)(torch.stack(images))
    assert features.shape == (60, 64) and logits.shape == (60, 3)


def test_reconstruction(tmp_path):
    """The tokenizer's tools: what codes keep of an image, of the tokenizer's size."""
    tiny = write_task("tokenizer", tmp_path)
    weights = write_weights(tiny.config, tmp_path / "w.pth")
    predict.main([tiny.config, str(weights), str(tiny.inputs), "--out", str(tmp_path / "out")])
    results = json.loads((tmp_path / "out/predictions.json").read_text())
    assert len(results) == 2 and all(Image.open(result["restored"]).size == (8, 8) for result in results)


@pytest.mark.slow
@pytest.mark.parametrize("task", (*BOTH, "tokenizer"))
def test_killed_run_resumes_bit_equal(tmp_path, task):
    """Noise, times, dropped labels and averages go on as if nothing had happened."""
    tiny, work = write_task(task, tmp_path), {name: tmp_path / name for name in ("whole", "torn")}
    argv = [tiny.config, "--cfg-options", "train_cfg.max_epochs=3", "--work-dir"]
    train.main([*argv, str(work["whole"])])
    for epoch in (1, 2):
        killed([*argv, str(work["torn"]), "--resume"], (work["torn"] / f"epoch_{epoch}.pth").exists)
    train.main([*argv, str(work["torn"]), "--resume"])
    a, b = (checkpoint(folder / "epoch_3.pth") for folder in work.values())
    for part in ("state_dict", "ema_state_dict"):
        assert a[part].keys() == b[part].keys()
        assert all(torch.equal(value, b[part][key]) for key, value in a[part].items())
    scalars = [x["message_hub"]["log_scalars"]["train/loss"].data[0].tolist() for x in (a, b)]
    assert scalars[0] == scalars[1]


# --- bad input ------------------------------------------------------------------------------------------------------


def test_bad_settings(tmp_path, capsys):
    """One line each, before anything is written."""
    flow, scales = (write_task(task, _folder(tmp_path / task)) for task in BOTH)
    small = vae(tmp_path / "vae", channels=8)
    for tiny, changed, said in (
        (flow, "img_resolution=10", "img_resolution: expected sides that are multiples of 8 (4 tokens of 2)"),
        (flow, "img_resolution=(16, 40)", "a height that is one of a quarter of the width"),
        (flow, "sampler='ddim'", "sampler='ddim'; expected one of euler, heun, midpoint, rk4, dopri5"),
        (flow, "steps=0", "steps=0; expected a whole number of 1 at least"),
        (flow, "path='cosine'", "path='cosine'; expected one of linear, gvp, vp"),
        (flow, f"vae=dict(pretrained={small!r})", "has 8 channels; expected a VAE of 3 channels, as the model"),
        (flow, "label_dropout=0.0", 'guidance=2.0: the model has no row for "no class"'),
        (flow, "num_classes=4", "has 3 class folders"),
        (scales, "V=24", "tokenizer.pth' does not fit model 'mvar_tokenizer'"),
        (scales, "patch_nums=(1, 4, 2)", "patch_nums: expected sides that grow from 1 at least, got (1, 4, 2)"),
        (scales, "tokenizer=dict(pretrained='absent.pth')", "checkpoint 'absent.pth': no such file"),
        (scales, "tokenizer=dict(V=24)", "tokenizer: expected V=16 as the transformer has, got V=24"),
    ):
        config = Path(tiny.config).with_name("changed.py")
        config.write_text(f"_base_ = ['config.py']\nmodel = dict({changed})\n")
        line = refused(capsys, train.main, config, "--work-dir", tmp_path / "w")
        assert said in line, changed
    assert not (tmp_path / "w").exists()


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_bad_samples(tiny, tmp_path, capsys):
    weights, out = write_weights(tiny.config, tmp_path / "w.pth"), tmp_path / "out"
    flow = "dimsum" in Path(tiny.config).read_text()
    cases = [
        ("--classes 3", "--classes 3: expected numbers of 0 to 2, or names"),
        ("--count 0", "--count 0; expected 1"),
    ]
    if flow:
        cases += [("--sampler ddim", "sampler='ddim'; expected"), ("--steps 0", "steps=0; expected a whole number")]
        cases += [("--top-k 5", "--top-k: FlowMatching takes --guidance, --sampler, --steps alone")]
    else:
        cases += [("--top-p 1.5", "top_p=1.5; expected 0 at least, and a share of 1")]
        cases += [("--steps 5", "--steps: NextScale takes --guidance, --top-k, --top-p alone")]
    for options, said in cases:
        line = refused(capsys, predict.main, tiny.config, weights, "--out", out, *options.split())
        assert said in line
    assert not out.exists()


def test_images_of_another_size(tmp_path, capsys):
    """What the pipeline gives must fit the model."""
    for task, said in (("flow", "x: expected latents (B, 3, 8, 8)"), ("next scale", "image: expected (B, 3, 8, 8)")):
        tiny = write_task(task, _folder(tmp_path / task))
        config = Path(tiny.config)
        steps = [dict(type="LoadImageFromFile"), dict(type="Resize", scale=24), dict(type="PackInputs")]
        config.write_text(f"{config.read_text()}\ntrain_dataloader['dataset']['pipeline'] = {steps!r}\n")
        assert said in refused(capsys, train.main, config, "--work-dir", tmp_path / "w" / task)


def test_missing_packages(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(
        InputError, match=r'diffusers is not installed; expected it by: pip install "linzoo\[generate\]"'
    ):
        FlowMatching(**MINI, vae=dict(pretrained="x"))
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(InputError, match="torchdiffeq is not installed"):
        FlowMatching(**MINI)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(InputError, match="torch-fidelity is not installed; expected it, or a judge"):
        GenerationMetric()


def test_vae_that_is_none(tmp_path):
    with pytest.raises(InputError, match="no such VAE; expected a name on the hub or a folder"):
        FlowMatching(**MINI, vae=dict(pretrained=str(_folder(tmp_path / "empty"))))


def test_models_of_another_task():
    for name in ("mvar_d12", "mvar_tokenizer"):
        with pytest.raises(
            InputError, match=r"has no forward_features\(\); expected a model of kind generation, such as"
        ):
            FlowMatching(name, patch_nums=(1, 2), ch=32) if "tok" in name else FlowMatching(name, depth=1)
    with pytest.raises(InputError, match="'vmamba_t' is of kind 'backbone'; expected a model of kind generation"):
        NextScale("vmamba_t", tokenizer={})


def test_tokenizer_without_weights():
    with pytest.raises(InputError, match="tokenizer.pretrained is not given; expected the file of a trained tokenizer"):
        NextScale("mvar_d12", depth=1, tokenizer=dict(ch=32))
