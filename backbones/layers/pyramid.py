"""timm's interface for all pyramids of stages: features, intermediates, pruning, checkpointing, the classifier."""

from functools import partial

import torch
from timm.layers import ClassifierHead, get_device_dtype, trunc_normal_
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import nn

from .script import refuse_script


class Stage(nn.Module):
    """``norm(blocks(downsample(x)))``, the blocks with gradient checkpointing if enabled.

    Args:
        blocks: List of modules.
        downsample: Module before the blocks, None for none.
        norm: Module after them, None for none.
    """

    def __init__(self, blocks: list[nn.Module], downsample: nn.Module | None = None, norm: nn.Module | None = None):
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = nn.Identity() if downsample is None else downsample
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.Identity() if norm is None else norm

    def forward(self, x):
        return self.norm(self.run_blocks(self.downsample(x)))

    def run_blocks(self, x):
        """Runs only the blocks."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


class Pyramid(nn.Module):
    """Base of the families whose stages have decreasing resolution; maps are channel-last.

    A family's constructor calls `super().__init__` and sets `stem`, `stages` (an `nn.Sequential` of `Stage`), `norm`
    and `head` (a `ClassifierHead`).

    Args:
        dims: Channels of each stage.
        reduction: Stride of the stem; every further stage halves the map.
        in_chans: Input channels.
        num_classes: Classes; 0 for none.
        drop_rate: Dropout before the classifier.
    """

    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        dims: tuple[int, ...],
        reduction: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
    ):
        super().__init__()
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.drop_rate = drop_rate
        self.output_fmt = "NHWC"
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = [
            dict(num_chs=dim, reduction=reduction * 2**i, module=f"stages.{i}") for i, dim in enumerate(dims)
        ]

    def classifier_head(self, global_pool, device=None, dtype=None):
        """The usual head: global pooling, dropout, a linear classifier."""
        dd: dict = {"device": device, "dtype": dtype}
        head = ClassifierHead(
            self.num_features, self.num_classes, global_pool, self.drop_rate, input_fmt=self.output_fmt, **dd
        )
        self.head_hidden_size = head.num_features
        return head

    def init_weights(self, needs_reset=True):
        """Fills the parameters; with `needs_reset` (after `to_empty`) also those that constructors fill."""
        self.apply(partial(self._init_weights, needs_reset=needs_reset))

    @staticmethod
    def _init_weights(module, needs_reset=False):
        """Linear maps: truncated normal of std 0.02 and zeros. Other modules initialise themselves."""
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif needs_reset and hasattr(module, "reset_parameters"):
            module.reset_parameters()
        elif hasattr(module, "keep_variance"):  # a GRKAN; its linear maps were visited before it
            module.keep_variance()

    @torch.jit.ignore
    def no_weight_decay(self):
        """The scans' skips D: matrices here, but vectors in the published recipes."""
        return {name for name, _ in self.named_parameters() if name.endswith(".s6.D")}

    @torch.jit.ignore
    def group_matcher(self, coarse=False):
        """Layer groups for layer-wise learning rate decay: stem, blocks in order, the rest."""
        blocks = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^stages\.(\d+)\.norm", (99998,)),
            (r"^(?:norm|class_block)", (99999,)),
        ]
        return dict(stem=r"^stem", blocks=r"^stages\.(\d+)" if coarse else blocks)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable=True):
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self):
        return self.head.fc

    def reset_classifier(self, num_classes, global_pool=None):
        """Replaces the classifier; `global_pool` None keeps the pooling."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, in_features=self.num_features, **get_device_dtype(self))
        self.head_hidden_size = self.head.num_features

    def forward_intermediates(
        self, x, indices=None, norm=False, stop_early=False, output_fmt="NCHW", intermediates_only=False
    ):
        """The stages' maps.

        Args:
            x: Images ``(B, 3, H, W)``.
            indices: The last n stages if int, all if None, else those listed.
            norm: Apply the final norm to the last stage's map.
            stop_early: Stop after the last requested stage.
            output_fmt: 'NCHW' or 'NHWC'.
            intermediates_only: Return only the maps.

        Returns:
            The output of `forward_features` and the list of maps; or only that list.

        Raises:
            ValueError: `output_fmt` is neither.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt: expected 'NCHW' or 'NHWC', got {output_fmt!r}")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        last = len(self.feature_info) - 1
        x = self.stem(x)
        intermediates = []
        for i, stage in enumerate(self.stages[: max_index + 1] if stop_early else self.stages):
            x = stage(x)
            if i in take_indices:
                intermediates.append(self.norm(x) if norm and i == last else x)
        if output_fmt == "NCHW":
            intermediates = [y.permute(0, 3, 1, 2).contiguous() for y in intermediates]
        return intermediates if intermediates_only else (self.final_features(x), intermediates)

    def prune_intermediate_layers(self, indices=1, prune_norm=False, prune_head=True):
        """Removes what the maps `indices` do not need; returns the indices, normalised.

        With `prune_head` False the classifier is kept if its stage is.
        """
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        pruned = max_index < len(self.stages) - 1
        self.stages = self.stages[: max_index + 1]
        if pruned:
            self.num_features = self.feature_info[max_index]["num_chs"]
        if prune_norm or pruned:
            self.norm = nn.Identity()
        if prune_head or pruned:
            self.reset_classifier(0, "")
        return take_indices

    def final_features(self, x):
        """The last stage's map, as `forward_features` returns it."""
        return self.norm(x)

    def forward_features(self, x):
        """Images ``(B, 3, H, W)`` to the final map ``(B, H', W', C)``."""
        return self.final_features(self.stages(self.stem(x)))

    def forward_head(self, x, pre_logits=False):
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))
