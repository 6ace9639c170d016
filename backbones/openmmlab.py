"""The zoo as a backbone for OpenMMLab configs: ``custom_imports = dict(imports=["linzoo.backbones.openmmlab"])``.

Of the backbones, only this module needs mmengine; `linzoo.backbones` does not import it.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from timm.layers import LayerNorm2d
from timm.models import get_pretrained_cfg_value, group_parameters
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .checkpoints import convert_state_dict, read_checkpoint
from .layers.simple_pyramid import STRIDES, rescale
from .layers.vit_adapter import ViTAdapter
from .layers.without_memory import without_memory
from .openmmlab_ops import stand_in

__all__ = ["LinZooBackbone"]

stand_in()  # before mmseg and mmdet look for mmcv's operators


@MODELS.register_module()
class LinZooBackbone(BaseModule):
    """Maps of a timm model for mmdet, mmseg and mmpretrain: `type="LinZooBackbone"` in any of their configs.

    A model with stages returns their maps, at its own strides (4, 8, 16 and 32 for most). A model whose tokens keep one
    resolution (Vim, Vision-RWKV, KAT ...) returns four maps at strides 4, 8, 16 and 32: the patch tokens after the
    first to the fourth quarter of its blocks, resized by the simple pyramid of ViTDet (arXiv 2203.16527).

    Layers that the chosen maps do not need are removed, so that every parameter gets a gradient.

    The state dict has the timm model's names under ``model.``. State dicts of the authors' own detectors and segmenters
    (``backbone.*`` in the authors' names, norms of the maps as ``outnorm{i}``) are converted on loading.

    Args:
        model_name: Name of a model of the zoo or of timm.
        model_kwargs: Further keywords of `timm.create_model`.
        pretrained: True for the model's published weights; or a file (.safetensors, .pth) or URL of a checkpoint from
            any trainer, in the authors' layout or ours, of the classifier or of a model around it (see
            `linzoo.backbones.checkpoints`).
        out_indices: The maps to return, as indices of levels.
        out_norm: Give each map its own LayerNorm instead of the model's final norm. Without it the maps are those of
            the model's `features_only`.
        frozen_stages: -1: nothing is frozen; 0: the stem; k: the stem and the first k stages (quarters of the blocks,
            if there are no stages). Frozen parts do not learn and stay in eval mode.
        norm_eval: Keep every BatchNorm in eval mode in training.
        with_cp: Save memory by gradient checkpointing.
        drop_path_rate: Stochastic depth of the last block.

    Attributes:
        channels: Channels of the returned maps.
        strides: Their strides.

    Raises:
        ValueError: unknown model; a level that the model does not have; a checkpoint of another model.
        FileNotFoundError: the file of `pretrained` does not exist.
    """

    def __init__(
        self,
        model_name: str,
        model_kwargs: dict[str, Any] | None = None,
        pretrained: bool | str | Path = False,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        out_norm: bool = False,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        if not timm.is_model(model_name.partition(".")[0]):
            raise ValueError(f"model_name: expected a model of timm or LinZoo, got {model_name!r}")
        kwargs = dict(model_kwargs or {}, drop_path_rate=drop_path_rate)
        if get_pretrained_cfg_value(model_name, "fixed_input_size"):  # timm's ViTs take any size where they are told to
            kwargs = dict(dynamic_img_size=True, dynamic_img_pad=True) | kwargs
        model = timm.create_model(model_name, pretrained=pretrained is True, num_classes=0, **kwargs)

        info = [entry if isinstance(entry, dict) else vars(entry) for entry in model.feature_info]
        strides = [entry["reduction"] for entry in info]
        self.single_scale = len(set(strides)) == 1
        # Indices of the model's own maps, and their last groups of layers, level by level.
        if self.single_scale:
            taps = [len(info) * (i + 1) // len(STRIDES) - 1 for i in range(len(STRIDES))]
            ends = [tap + 1 for tap in taps]
        else:
            taps = list(range(len(info)))
            quarter = len(model.backbone.blocks) // len(info) if isinstance(model, ViTAdapter) else 1
            ends = [(i + 1) * quarter for i in taps]
        self.out_indices = tuple(out_indices)
        if not out_indices or len({*out_indices} & {*range(len(taps))}) < len(self.out_indices):
            raise ValueError(
                f"out_indices: expected different levels from 0 to {len(taps) - 1} of {model_name!r}, "
                f"got {out_indices!r}"
            )
        if frozen_stages not in range(-1, len(taps) + 1):
            raise ValueError(f"frozen_stages: expected -1 to {len(taps)} for {model_name!r}, got {frozen_stages!r}")
        groups = group_parameters(model, model.group_matcher(coarse=True)) if frozen_stages >= 0 else {}
        last = ends[frozen_stages - 1] if frozen_stages > 0 else 0
        frozen = {name for group, names in groups.items() if group <= last for name in names}
        self.norm_eval = norm_eval

        state = None
        if isinstance(pretrained, (str, Path)):
            state = convert_state_dict(read_checkpoint(pretrained).state, model)
        self.taps = [taps[i] for i in self.out_indices]
        # As in `features_only`: only GroupMamba's last map passes the model's final norm.
        self.final_norm = not out_norm and not self.single_scale and _normed_features(model_name)
        model.prune_intermediate_layers(self.taps, prune_norm=not self.final_norm, prune_head=True)
        if state is not None:
            _load(model, state, pretrained)
        model.set_grad_checkpointing(with_cp)
        self.model = model
        self.frozen = {f"model.{name}" for name, _ in model.named_parameters() if name in frozen}

        self.channels = [info[tap]["num_chs"] for tap in self.taps]
        wanted = STRIDES if self.single_scale else _levels(strides)
        self.strides = [wanted[i] for i in self.out_indices]
        self.rescale = nn.ModuleDict(
            {
                str(i): rescale(channels, strides[tap], stride)
                for i, tap, channels, stride in zip(
                    self.out_indices, self.taps, self.channels, self.strides, strict=True
                )
                if strides[tap] != stride
            }
        )
        self.norms = nn.ModuleDict(
            {
                str(i): LayerNorm2d(channels, eps=1e-5)
                for i, channels in zip(self.out_indices, self.channels, strict=True)
                if out_norm
            }
        )
        self._register_load_state_dict_pre_hook(self._convert_published)
        self._freeze()

    def init_weights(self) -> None:
        """Does nothing: timm initialises or loads in `create_model`, and doing it again would undo a loading."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images ``(B, 3, H, W)`` to a tuple of maps ``(B, channels[i], H / strides[i], W / strides[i])``."""
        maps = self.model.forward_intermediates(
            x, indices=sorted(self.taps), norm=self.final_norm, stop_early=True, intermediates_only=True
        )
        by_tap = dict(zip(sorted(self.taps), maps, strict=True))
        out = []
        for i, tap in zip(self.out_indices, self.taps, strict=True):
            y = by_tap[tap]
            for part in (self.norms, self.rescale):
                y = part[str(i)](y) if str(i) in part else y
            out.append(y)
        return tuple(out)

    def train(self, mode: bool = True) -> "LinZooBackbone":
        """As `nn.Module.train`; frozen parts stay in eval mode, and with `norm_eval` every BatchNorm."""
        super().train(mode)
        self._freeze()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def _freeze(self):
        if not self.frozen:
            return
        for name, parameter in self.named_parameters():
            if name in self.frozen:
                parameter.requires_grad_(False)
        for module in self.model.modules():
            parameters = list(module.parameters())
            if parameters and not any(p.requires_grad for p in parameters):
                module.eval()

    def _convert_published(self, state_dict, prefix, *_):
        """Renames the entries of an authors' detector or segmenter to our names, in place."""
        names = [key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)]
        if not names or any(name.startswith(("model.", "norms.", "rescale.")) for name in names):
            return
        published = {name: state_dict.pop(prefix + name) for name in names}
        norms = {name for name in published if re.match(r"outnorm\d+\.", name)}
        for name in norms:
            state_dict[prefix + name.replace("outnorm", "norms.", 1)] = published.pop(name)
        ours = self.model.state_dict()
        for name, value in convert_state_dict(published, self.model).items():
            if name in ours:  # not the classifier, which a published file may still hold
                state_dict[f"{prefix}model.{name}"] = value


def _levels(strides):
    """Strides of the maps of a model with stages: its own, each at least twice the one before."""
    levels = list(strides)
    for i in range(1, len(levels)):
        levels[i] = max(levels[i], 2 * levels[i - 1])
    return levels


def _normed_features(model_name):
    """Whether the model's `features_only` gives its last map after the final norm."""
    with without_memory():
        net = timm.create_model(model_name, features_only=True)
    return bool(getattr(net, "norm", False))


def _load(model, state, source):
    """Loads every tensor that `model` needs."""
    ours = model.state_dict()
    wrong = [key for key, value in ours.items() if key not in state or state[key].shape != value.shape]
    if wrong:
        key = wrong[0]
        has = tuple(state[key].shape) if key in state else "absent"
        raise ValueError(
            f"pretrained: checkpoint {str(source)!r} does not fit {model.pretrained_cfg['architecture']!r}: "
            f"{len(wrong)} tensors differ, such as {key!r} (checkpoint {has}, model {tuple(ours[key].shape)})"
        )
    model.load_state_dict({key: state[key] for key in ours})
