"""VideoMamba for clips: one sequence, frame after frame; see `videomamba`."""

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features_fx import register_notrace_function
from torch import Tensor, nn

from .layers import unwrap_state_dict
from .layers.checkpoint import stack_directions
from .layers.isotropic import patch_grid, with_token
from .layers.pretrained import imagenet_cfg
from .videomamba import VideoMamba

__all__ = ["VideoMambaVideo"]


class VideoMambaVideo(VideoMamba):
    """VideoMamba for clips ``(B, 3, T, H, W)`` (arXiv 2403.06977).

    Tubelets, frame after frame and row after row, form one sequence after one class token. Positions within the frame
    and in time are learned separately. For other sizes and numbers of frames than the model's, both are interpolated.

    Args:
        num_frames: Frames of a clip that fit the positions in time.
        tubelet_size: Frames in a tubelet.
        img_size: As in `VideoMamba`, like all further arguments.

    Raises:
        ValueError: `num_frames` is smaller than a tubelet.
    """

    def __init__(
        self,
        num_frames: int = 8,
        tubelet_size: int = 1,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 400,
        global_pool: str = "token",
        dim: int = 192,
        depth: int = 24,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        self.num_frames, self.tubelet_size = num_frames, tubelet_size
        steps = tubelets(num_frames, tubelet_size, "num_frames")
        super().__init__(
            img_size, patch_size, in_chans, num_classes, global_pool, dim, depth, drop_rate, drop_path_rate, **dd
        )
        side = (tubelet_size, patch_size, patch_size)
        self.patch_embed = nn.Conv3d(in_chans, dim, side, side, **dd)
        self.time_embed = nn.Parameter(torch.zeros(1, steps, dim, **dd))

    def init_weights(self, needs_reset: bool = True) -> None:
        """Fills the parameters; with `needs_reset` (after `to_empty`) also those that constructors fill."""
        super().init_weights(needs_reset)
        if needs_reset:
            nn.init.zeros_(self.time_embed)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """As for images, plus positions in time."""
        return super().no_weight_decay() | {"time_embed"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """As in `Isotropic`."""
        return dict(super().group_matcher(coarse), stem=r"^cls_token|pos_embed|time_embed|patch_embed")

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """Clips ``(B, 3, T, H, W)`` to tokens ``(B, 1 + T H W, C)`` with positions, and their grid (T, H, W).

        Raises:
            ValueError: the input is no clip, has fewer frames than a tubelet, or frames smaller than a patch.
        """
        if x.dim() != 5:
            raise ValueError(f"x: expected clips (B, {self.in_chans}, T, H, W), got {tuple(x.shape)}")
        steps = tubelets(x.shape[2], self.tubelet_size, "x")
        grid = patch_grid(x.shape[3], x.shape[4], self.patch_size, self.stride)
        x = self.patch_embed(x).flatten(3).permute(0, 2, 3, 1)
        table = self.positions(grid)
        time = resize_time(self.time_embed, steps)
        x = (x + table[:, 1:].unsqueeze(1) + time.unsqueeze(2)).flatten(1, 2)
        x = with_token(x, torch.add(self.cls_token, table[:, :1]).expand(x.shape[0], -1, -1), first=True)
        return x.to(torch.promote_types(x.dtype, torch.float32)), (steps, *grid)

    def forward_intermediates(
        self, x, indices=None, norm=False, stop_early=False, output_fmt="NCTHW", intermediates_only=False
    ):
        """The blocks' tokens as maps in time: as in `Isotropic`, with 'NCTHW' and 'NTHWC' besides 'NLC'.

        Raises:
            ValueError: `output_fmt` is none of these.
        """
        if output_fmt not in ("NCTHW", "NTHWC", "NLC"):
            raise ValueError(f"output_fmt: expected 'NCTHW', 'NTHWC' or 'NLC', got {output_fmt!r}")
        out = super().forward_intermediates(x, indices, norm, stop_early, "NLC", intermediates_only)
        if output_fmt == "NLC":
            return out
        maps = out if intermediates_only else out[1]
        grid = patch_grid(x.shape[3], x.shape[4], self.patch_size, self.stride)
        maps = [y.unflatten(1, (x.shape[2] // self.tubelet_size, *grid)) for y in maps]
        maps = maps if output_fmt == "NTHWC" else [y.permute(0, 4, 1, 2, 3).contiguous() for y in maps]
        return maps if intermediates_only else (out[0], maps)


@register_notrace_function
def tubelets(frames: int, size: int, name: str) -> int:
    """Number of tubelets of `size` frames in a clip; ValueError if it is shorter than one."""
    if frames < size:
        raise ValueError(f"{name}: expected at least {size} frames, which are a tubelet, got {frames}")
    return frames // size


@register_notrace_function
def resize_time(table: Tensor, steps: int) -> Tensor:
    """Positions in time ``(1, T, C)``, interpolated linearly for another number of steps."""
    if steps == table.shape[1]:
        return table
    return F.interpolate(table.mT, size=steps, mode="linear", align_corners=False).mT


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: VideoMambaVideo) -> dict[str, Tensor]:
    """Converts a published state dict, of clips or of images, to ours.

    Image patches become tubelets that read their middle frame, with positions in time of 0.
    """
    state_dict = dict(unwrap_state_dict(state_dict))
    if "temporal_pos_embedding" in state_dict:
        state_dict["time_embed"] = state_dict.pop("temporal_pos_embedding")
    out = stack_directions(state_dict)
    out["pos_embed"] = model.fit_positions(out["pos_embed"])
    time = out.get("time_embed")
    out["time_embed"] = (
        torch.zeros_like(model.time_embed) if time is None else resize_time(time, model.time_embed.shape[1])
    )
    kernel = out["patch_embed.weight"]
    if kernel.dim() == 4:
        inflated = kernel.new_zeros(*kernel.shape[:2], model.tubelet_size, *kernel.shape[2:])
        inflated[:, :, model.tubelet_size // 2] = kernel
        out["patch_embed.weight"] = inflated
    return out


def _cfg(**kwargs):
    return imagenet_cfg(
        num_classes=400,
        pool_size=None,
        min_input_size=(3, 16, 16),
        first_conv="patch_embed",
        classifier="head",
        license="apache-2.0",
        origin_url="https://github.com/OpenGVLab/VideoMamba",
        paper_ids="arXiv:2403.06977",
        **kwargs,
    )


default_cfgs = generate_default_cfgs({f"videomamba_{size}_video.k400": _cfg() for size in "tsm"})


def _create(variant: str, pretrained: bool = False, **kwargs) -> VideoMambaVideo:
    return build_model_with_cfg(
        VideoMambaVideo, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs
    )


@register_model
def videomamba_t_video(pretrained: bool = False, **kwargs) -> VideoMambaVideo:
    """VideoMamba-Ti on clips."""
    return _create("videomamba_t_video", pretrained, **kwargs)


@register_model
def videomamba_s_video(pretrained: bool = False, **kwargs) -> VideoMambaVideo:
    """VideoMamba-S on clips."""
    return _create("videomamba_s_video", pretrained, **dict(dict(dim=384), **kwargs))


@register_model
def videomamba_m_video(pretrained: bool = False, **kwargs) -> VideoMambaVideo:
    """VideoMamba-M on clips."""
    return _create("videomamba_m_video", pretrained, **dict(dict(dim=576, depth=32), **kwargs))
