"""Image generation by class: flow matching and next-scale models to train, tokenizers, samples, and their quality."""

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS, MODELS
from torch import Tensor, nn
from torch.nn import functional as F

from linzoo.generate import flow, next_scale

from .errors import InputError
from .files import save_image
from .images import read_rgb, to_pixels
from .task import Job, Task, TimmModel
from .weights import create_model

BATCH = 32  # samples that `predict` makes at once


def require(package: str) -> Any:
    """A package of the extra `generate`; InputError if it is not installed."""
    try:
        return __import__(package)
    except ImportError as e:
        raise InputError(f'{package} is not installed; expected it by: pip install "linzoo[generate]"') from e


class Frozen:
    """A model that is used, not trained: none of its tensors enters the optimizer, checkpoints, DDP or averages."""

    def __init__(self, model: nn.Module):
        self.model = model.eval().requires_grad_(False)

    def on(self, device: torch.device) -> Any:
        """The model, on a device."""
        return self.model.to(device)

    def __deepcopy__(self, memo: dict) -> "Frozen":
        return self


class Autoencoder:
    """Latents of images by a VAE with the interface of diffusers' AutoencoderKL.

    Args:
        pretrained: its name on the Hugging Face hub, or a folder from `save_pretrained`; loaded at first use.
        scale: factor of the latents; None for the VAE's own factor.

    Raises:
        InputError: diffusers is not installed.
    """

    def __init__(self, pretrained: str, scale: float | None = None):
        self.name, self.given = pretrained, scale
        self.kind = require("diffusers").AutoencoderKL

    @functools.cached_property
    def config(self) -> dict:
        """Its settings; InputError if there is no such VAE."""
        try:
            return self.kind.load_config(self.name)
        except (OSError, ValueError) as e:
            raise InputError(
                f"vae.pretrained={self.name!r}: no such VAE; expected a name on the hub or a folder"
            ) from e

    @functools.cached_property
    def frozen(self) -> Frozen:
        """The VAE."""
        return Frozen(self.kind.from_pretrained(self.name))

    @property
    def scale(self) -> float:
        """Factor of the latents."""
        return self.config.get("scaling_factor", 0.18215) if self.given is None else self.given

    def check(self, channels: int) -> None:
        """InputError if its latents have another number of channels."""
        found = self.config["latent_channels"]
        if found != channels:
            expected = f"a VAE of {channels} channels, as the model"
            raise InputError(f"vae.pretrained={self.name!r} has {found} channels; expected {expected}")

    def __deepcopy__(self, memo: dict) -> "Autoencoder":
        return self

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images in [-1, 1] to sampled latents."""
        return self.frozen.on(images.device).encode(images).latent_dist.sample() * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents to images in [-1, 1]."""
        return self.frozen.on(latents.device).decode(latents / self.scale).sample


class ImageGenerator(TimmModel):
    """Shared code for models that generate images by class: labels, seeded samples, `linzoo predict` without inputs.

    Args:
        model_name: timm name; other arguments as in `TimmModel`.
        guidance: scale of the class guidance, in samples.
        seed: of the first sample in a validation; the others count up.
    """

    kinds = ("generation",)
    inputs = ("input", ())
    settings: tuple[str, ...] = ()  # options of `sample`, besides the guidance

    def __init__(
        self, model_name: str, *args, guidance: float, seed: int = 0, data_preprocessor: dict | None = None, **kwargs
    ):
        data_preprocessor = {"type": "mmpretrain.ClsDataPreprocessor", **(data_preprocessor or {})}
        super().__init__(model_name, *args, data_preprocessor=data_preprocessor, **kwargs)
        self.guidance, self.seed = guidance, seed

    def sample(self, y: Tensor, seeds: Sequence[int], guidance: float | None = None, **options) -> Tensor:
        """Images ``(B, C, H, W)`` in [0, 1] for classes ``(B,)``, one seed each."""
        raise NotImplementedError

    def losses(self, images: Tensor, y: Tensor) -> dict[str, Tensor]:
        """The losses for images in [-1, 1] and their classes, some of them replaced by "no class"."""
        raise NotImplementedError

    def forward(self, inputs: Tensor, data_samples: list | None = None, mode: str = "tensor") -> Any:
        """Images ``(B, C, H, W)`` in [-1, 1] with their labels.

        Args:
            mode: "loss" for the losses; "tensor" for samples of the same classes, in [0, 1], with seeds from their
                indices in the data set; "predict" for data samples with these as `generated`, next to `real`.
        """
        samples = data_samples or []
        y = torch.cat([sample.gt_label for sample in samples]).to(inputs.device)
        if len(y) and not 0 <= int(y.min()) <= int(y.max()) < self.model.num_classes:
            raise InputError(
                f"label {int(y.max())} of an image; expected 0 to {self.model.num_classes - 1}, as the model"
            )
        if mode == "loss":
            try:
                return self.losses(inputs, y)
            except ValueError as e:
                raise InputError(str(e)) from e
        images = self.sample(y, [self.seed + sample.get("sample_idx", i) for i, sample in enumerate(samples)])
        if mode == "tensor":
            return images
        for sample, image, real in zip(samples, images, inputs, strict=True):
            sample.set_field(image.cpu(), "generated")
            sample.set_field((real.cpu() + 1) / 2, "real")
        return samples

    @staticmethod
    def options(parser: argparse._ArgumentGroup) -> None:
        """Adds the options for classes, number, seed and sampling."""
        parser.add_argument("--classes", nargs="+", help="class numbers or names; default: all")
        parser.add_argument("--count", type=int, default=8, help="images per class")
        parser.add_argument("--seed", type=int, default=0, help="seed of the first image; the others count up")
        parser.add_argument("--guidance", type=float, help="guidance scale, instead of the config's")
        parser.add_argument("--sampler", help=f"for flows: {', '.join(flow.SAMPLERS)}, instead of the config's")
        parser.add_argument("--steps", type=int, help="for flows, instead of the config's")
        parser.add_argument("--top-k", type=int, help="for next-scale models, instead of the config's")
        parser.add_argument("--top-p", type=float, help="for next-scale models, instead of the config's")

    def asked(self, options: argparse.Namespace) -> dict[str, Any]:
        """The options of `sample` given on the command line; InputError for those that it does not take."""
        given = {name: getattr(options, name) for name in ("guidance", *FlowMatching.settings, *NextScale.settings)}
        given = {name: value for name, value in given.items() if value is not None}
        taken = ("guidance", *self.settings)
        for name in given:
            if name not in taken:
                ours = ", ".join(f"--{option}" for option in taken).replace("_", "-")
                raise InputError(f"--{name.replace('_', '-')}: {type(self).__name__} takes {ours} alone")
        return given

    def predict_files(self, job: Job) -> list[dict]:
        """For each image: its class, its seed and its file."""
        total, names = self.model.num_classes, job.classes or []
        wanted = []
        for name in job.options.classes or range(total):
            index = names.index(name) if name in names else int(name) if str(name).isdecimal() else -1
            if not 0 <= index < total:
                raise InputError(f"--classes {name}: expected numbers of 0 to {total - 1}, or names of the classes")
            wanted += [index] * job.options.count
        if job.options.count < 1:
            raise InputError(f"--count {job.options.count}; expected 1 at least")
        device, results, options = next(self.parameters()).device, [], self.asked(job.options)
        for start in range(0, len(wanted), BATCH):
            part = wanted[start : start + BATCH]
            seeds = [job.options.seed + start + i for i in range(len(part))]
            try:
                images = self.sample(torch.tensor(part, device=device), seeds, **options)
            except ValueError as e:
                raise InputError(str(e)) from e
            for index, seed, image in zip(part, seeds, images, strict=True):
                name = names[index] if index < len(names) else str(index)
                file = job.out / "images" / f"{index:04d}_{seed:06d}.png"
                save_image(to_pixels(image), file)
                results.append({"path": str(file), "class": name, "seed": seed})
        return results

    @staticmethod
    def draw(axis: Axes, result: dict) -> None:
        """The image with its class."""
        axis.imshow(read_rgb(result["path"]))
        axis.set_title(result["class"], fontsize=10)


def drop_labels(y: Tensor, null: int | None, rate: float) -> Tensor:
    """Labels, randomly replaced by "no class" at a rate."""
    return y if null is None or rate <= 0 else torch.where(torch.rand(len(y), device=y.device) < rate, null, y)


@MODELS.register_module()
class FlowMatching(ImageGenerator):
    """A model of the velocity between noise and latents (or pixels); see `linzoo.generate.flow`.

    Args:
        model_name: timm name of a model such as `linzoo.backbones.DiMSUM`.
        path: "linear", "gvp" or "vp".
        lognormal: train at times sigmoid(N(-0.5, 1)) instead of uniform ones.
        sampler: how samples are made; one of `flow.SAMPLERS`.
        steps: number of steps, for samplers with a fixed step.
        vae: arguments of `Autoencoder`; None for pixels in [-1, 1].
        guidance, seed, and other arguments: see `ImageGenerator`.

    Raises:
        InputError: there is no such path or sampler, or `steps` is not positive; the VAE has other channels than the
            model; a package is not installed.
    """

    needs, example, settings = "forward_features", "dimsum_l_2", ("sampler", "steps")
    options = staticmethod(Task.options)  # the command line has those of its base

    def __init__(
        self, model_name: str, *args, path: str = "gvp", lognormal: bool = False, sampler: str = "dopri5",
        steps: int = 50, vae: dict | None = None, guidance: float = 1.0, **kwargs,
    ):  # fmt: skip
        super().__init__(model_name, *args, guidance=guidance, **kwargs)
        self.path, self.lognormal, self.sampler, self.steps = path, lognormal, sampler, steps
        self.check(sampler, steps)
        if path not in flow.PATHS:
            raise InputError(f"path={path!r}; expected one of {', '.join(flow.PATHS)}")
        require("torchdiffeq")
        self.vae = None if vae is None else Autoencoder(**vae)
        if self.vae is not None and (Path(self.vae.name).is_dir() or not self.model.pos_embed.is_meta):
            self.vae.check(self.model.in_channels)
        if guidance != 1 and self.model.null_class is None:
            raise InputError(
                f'guidance={guidance}: the model has no row for "no class"; expected label_dropout above 0'
            )

    def data_config(self, dataset: Any, pipeline: list[dict]) -> dict[str, Any]:
        """timm's settings for latents, or for pixels in [-1, 1]."""
        channels = self.model.in_channels
        size = (channels, *self.model.img_resolution)
        return {"input_size": size, "mean": (0.5,) * channels, "std": (0.5,) * channels, "crop_pct": 1.0}

    @staticmethod
    def check(sampler: str, steps: int) -> None:
        """InputError if there is no such sampler, or `steps` is not positive."""
        if sampler not in flow.SAMPLERS:
            raise InputError(f"sampler={sampler!r}; expected one of {', '.join(flow.SAMPLERS)}")
        if not isinstance(steps, int) or steps < 1:
            raise InputError(f"steps={steps!r}; expected a whole number of 1 at least")

    def losses(self, images: Tensor, y: Tensor) -> dict[str, Tensor]:
        """The flow-matching loss."""
        data = images if self.vae is None else self.vae.encode(images)
        y = drop_labels(y, self.model.null_class, self.model.label_dropout)
        start, t = torch.randn_like(data), flow.draw_times(len(y), self.path, lognormal=self.lognormal, device=y.device)
        x = flow.path_at(self.path, t, data).mix(data, start)
        return {"loss": flow.loss(self.model(x, t, y).float(), data, start, t, self.path).mean()}

    def asked(self, options: argparse.Namespace) -> dict[str, Any]:
        """Guidance, sampler and steps, checked."""
        found = super().asked(options)
        self.check(found.get("sampler", self.sampler), found.get("steps", self.steps))
        if found.get("guidance", 1) != 1 and self.model.null_class is None:
            raise InputError(f'--guidance {found["guidance"]}: the model has no row for "no class"; expected 1')
        return found

    @torch.no_grad()
    def sample(
        self, y: Tensor, seeds: Sequence[int], guidance: float | None = None, sampler: str | None = None,
        steps: int | None = None, **options,
    ) -> Tensor:  # fmt: skip
        """Images ``(B, C, H, W)`` in [0, 1]; arguments that are None come from the config."""
        shape = (self.model.in_channels, *self.model.img_resolution)
        guided = flow.guide(self.model, y, self.model.null_class, self.guidance if guidance is None else guidance)
        x = flow.noise(shape, flow.generators(seeds), y.device)
        x = flow.flow(guided, x, sampler or self.sampler, steps or self.steps, self.path)
        x = x if self.vae is None else self.vae.decode(x)
        return (x.clamp(-1, 1) + 1) / 2


@MODELS.register_module()
class NextScale(ImageGenerator):
    """A transformer over the code maps of a frozen tokenizer; see `linzoo.generate.next_scale`.

    Args:
        model_name: timm name of a model such as `linzoo.backbones.MVAR`.
        tokenizer: `model_name`, `pretrained` (a file) and further keywords of the tokenizer; numbers and sizes that it
            shares with the transformer may be left out.
        label_dropout: how often training replaces a class by "no class".
        top_k, top_p, smooth: see `next_scale.generate`.
        guidance, seed, and other arguments: see `ImageGenerator`.

    Raises:
        InputError: the tokenizer is not such a model, has no weights, or has another number of codes.
    """

    needs, example, settings = "step", "mvar_d16", ("top_k", "top_p")
    options = staticmethod(Task.options)

    def __init__(
        self, model_name: str, *args, tokenizer: dict, label_dropout: float = 0.1, top_k: int = 900,
        top_p: float = 0.96, smooth: bool = False, guidance: float = 1.5, **kwargs,
    ):  # fmt: skip
        super().__init__(model_name, *args, guidance=guidance, **kwargs)
        if not tokenizer.get("pretrained") and not self.model.pos_embed.is_meta:
            raise InputError("tokenizer.pretrained is not given; expected the file of a trained tokenizer")
        shared = {name: getattr(self.model, name) for name in ("V", "Cvae", "patch_nums")}
        model = create_model(**{"model_name": "mvar_tokenizer", **shared, **tokenizer})
        try:
            next_scale.check_pair(self.model, model)
        except (AttributeError, ValueError) as e:
            raise InputError(str(e)) from e
        self.tokenizer, self.label_dropout = Frozen(model), label_dropout
        self.top_k, self.top_p, self.smooth = top_k, top_p, smooth

    def losses(self, images: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Cross entropy of every code, given the coarser maps."""
        tokenizer = self.tokenizer.on(images.device)
        with torch.no_grad():
            codes = tokenizer.quantize(tokenizer.encode(images)).indices
            inputs = tokenizer.to_inputs(codes)
        logits = self.model(drop_labels(y, self.model.null_class, self.label_dropout), inputs)
        return {"loss": F.cross_entropy(logits.flatten(0, 1), torch.cat(codes, 1).flatten())}

    @torch.no_grad()
    def sample(
        self, y: Tensor, seeds: Sequence[int], guidance: float | None = None, top_k: int | None = None,
        top_p: float | None = None, **options,
    ) -> Tensor:  # fmt: skip
        """Images ``(B, C, H, W)`` in [0, 1]; arguments that are None come from the config."""
        given = dict(guidance=guidance, top_k=top_k, top_p=top_p)
        settings = {name: getattr(self, name) if value is None else value for name, value in given.items()}
        tokenizer, sources = self.tokenizer.on(y.device), flow.generators(seeds)
        return next_scale.generate(self.model, tokenizer, y, sources, smooth=self.smooth, **settings).images


@MODELS.register_module()
class ImageTokenizer(TimmModel):
    """A tokenizer to train on images, with the squared error of its reconstructions.

    Args:
        model_name: timm name of a model such as `linzoo.backbones.MVARTokenizer`; other arguments as in `TimmModel`.
    """

    kinds, needs, example = ("generation",), "quantize", "mvar_tokenizer"

    def __init__(self, model_name: str, *args, data_preprocessor: dict | None = None, **kwargs):
        data_preprocessor = {"type": "mmpretrain.ClsDataPreprocessor", **(data_preprocessor or {})}
        super().__init__(model_name, *args, data_preprocessor=data_preprocessor, **kwargs)

    def forward(self, inputs: Tensor, data_samples: Any = None, mode: str = "tensor") -> Any:
        """Images ``(B, C, H, W)`` in [-1, 1] to their reconstructions, or to the losses ("loss").

        "predict" returns a list of pairs (reconstruction, image), ``(C, H, W)`` in [0, 1], on the CPU.
        """
        try:
            if mode == "loss":
                return self.model.losses(inputs)
            kept = self.model(inputs)
        except ValueError as e:
            raise InputError(str(e)) from e
        pairs = zip((kept + 1) / 2, (inputs + 1) / 2, strict=True)
        return kept if mode == "tensor" else [(a.cpu(), b.cpu()) for a, b in pairs]

    def predict_files(self, job: Job) -> list[dict]:
        """For each image: its path, and that of its reconstruction."""
        pairs = [pair for batch in job.batches() for pair in self.test_step(batch)]
        results = []
        for path, file, (kept, _) in zip(job.inputs, job.place("restored", ".png"), pairs, strict=True):
            save_image(to_pixels(kept), file)
            results.append({"path": str(path), "restored": str(file)})
        return results

    @staticmethod
    def draw(axis: Axes, result: dict) -> None:
        """The image's reconstruction."""
        axis.imshow(read_rgb(result["restored"]))


class Judge(nn.Module):
    """A small network that classifies images as in a folder: scikit-learn's, with 64 hidden units.

    Args:
        folder: class folders of images.

    Shape:
        Images ``(B, C, H, W)`` in [0, 1] to features ``(B, 64)`` and logits ``(B, classes)``.
    """

    def __init__(self, folder: str | Path):
        from sklearn.neural_network import MLPClassifier

        from .classifier import find_classes

        super().__init__()
        found = find_classes(folder)
        images = torch.stack([self.shrink(_read(file))[0] for files in found.values() for file in files])
        labels = [i for i, files in enumerate(found.values()) for _ in files]
        learnt = MLPClassifier((64,), max_iter=1000, random_state=0).fit(images.double().numpy(), labels)
        for i, (weight, bias) in enumerate(zip(learnt.coefs_, learnt.intercepts_, strict=True)):
            self.register_buffer(f"weight{i}", torch.from_numpy(weight.T).float())
            self.register_buffer(f"bias{i}", torch.from_numpy(bias).float())

    @staticmethod
    def shrink(images: Tensor) -> Tensor:
        """Flattened grey images of 8 x 8."""
        return F.interpolate(images.mean(1, keepdim=True), (8, 8), mode="area").flatten(1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = F.linear(self.shrink(images), self.weight0, self.bias0).relu()
        return features, F.linear(features, self.weight1, self.bias1)


def _read(file: Path) -> Tensor:
    return torch.from_numpy(read_rgb(file).copy()).permute(2, 0, 1)[None].float() / 255


class _Features(nn.Module):
    """Passes features through: for torchmetrics' distances between features computed elsewhere."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        return x


@METRICS.register_module()
class GenerationMetric(BaseMetric):
    """How close generated images are to real ones: Frechet distance and inception score, by torchmetrics.

    With a judge the features are its hidden units. `accuracy` is how often it recognises the requested class, in
    percent; `accuracy_of_real` is the same for the real images. Without a judge the features are Inception's (FID and
    IS; this needs torch-fidelity, and torchmetrics downloads its weights).

    Args:
        judge: class folders of images to train a `Judge` on.

    Raises:
        InputError: without a judge, torch-fidelity is not installed.
    """

    default_prefix = "generate"

    def __init__(self, judge: str | None = None, **kwargs):
        super().__init__(**kwargs)
        self.judge = judge
        if judge is None:
            try:
                __import__("torch_fidelity")
            except ImportError as e:
                raise InputError("torch-fidelity is not installed; expected it, or a judge for the metric") from e

    @functools.cached_property
    def extract(self) -> nn.Module:
        """Images in [0, 1] to features and logits."""
        if self.judge is not None:
            return Judge(self.judge)
        from torchmetrics.image.fid import NoTrainInceptionV3

        return _Inception(NoTrainInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"]))

    @torch.no_grad()
    def process(self, data_batch: Any, data_samples: Sequence[Any]) -> None:
        """Features and logits of each generated image and of the real one next to it."""
        made, real = (torch.stack([sample[name] for sample in data_samples]) for name in ("generated", "real"))
        labels = [int(sample["gt_label"]) for sample in data_samples]
        rows = zip(*self.extract(made), *self.extract(real), labels, strict=True)
        self.results += [tuple(np.asarray(value) for value in row) for row in rows]

    def compute_metrics(self, results: list) -> dict[str, float]:
        """FID, IS, and the judge's accuracies."""
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.inception import InceptionScore

        made, said, real, of_real, labels = (
            torch.from_numpy(np.stack(column)) for column in zip(*results, strict=True)
        )
        distance = FrechetInceptionDistance(feature=_Features(made.shape[1]))
        distance.update(real, real=True)
        distance.update(made, real=False)
        score = InceptionScore(feature=_Features(said.shape[1]), splits=min(10, len(said)))
        score.update(said)
        with torch.random.fork_rng(devices=[]):  # it shuffles, and must not touch the run's random stream
            torch.manual_seed(0)
            found = {"FID": distance.compute().item(), "IS": score.compute()[0].item()}
        if self.judge is not None:
            found["accuracy"] = 100 * (said.argmax(1) == labels).double().mean().item()
            found["accuracy_of_real"] = 100 * (of_real.argmax(1) == labels).double().mean().item()
        return found


class _Inception(nn.Module):
    """torchmetrics' Inception-v3 for images in [0, 1]."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = self.model._torch_fidelity_forward((images.clamp(0, 1) * 255).byte())
        return features, logits
