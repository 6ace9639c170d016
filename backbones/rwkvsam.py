"""RWKV-SAM.

Paper: Mamba or RWKV: Exploring High-Quality and High-Efficiency Segment Anything Model
- https://arxiv.org/abs/2406.19369

A promptable segmenter. Points and boxes are encoded as in Segment Anything (arXiv 2304.02643). A two-way transformer
lets them and the image attend to each other. The backbone's maps at strides 4 and 8 sharpen the masks. The backbone is
in `rwkvsam_backbone.py`.

Maps are NCHW.
"""

import math
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import LayerNorm2d, Mlp, to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn
from torchvision.transforms.functional import normalize

from .layers.checkpoint import rename, reshape_as, unwrap_state_dict
from .layers.script import refuse_script
from .rwkvsam_backbone import checkpoint_filter_fn as convert_backbone

__all__ = ["RWKVSAM", "EncodedImage", "Prediction"]


class PromptEncoder(nn.Module):
    """Points and boxes to tokens (Segment Anything, section 3): random Fourier features of the position, plus a learned
    vector for the kind.

    Args:
        dim: Width D of the tokens.
    """

    def __init__(self, dim: int = 256, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.register_buffer("frequencies", torch.empty(2, dim // 2, **dd))
        self.point = nn.Parameter(torch.empty(2, dim, **dd))  # for negative and positive points
        self.corner = nn.Parameter(torch.empty(2, dim, **dd))  # for a box's upper left and lower right
        self.no_point = nn.Parameter(torch.empty(dim, **dd))
        self.no_mask = nn.Parameter(torch.empty(dim, **dd))
        self.reset_parameters()

    def reset_parameters(self):
        for tensor in (self.frequencies, *self.parameters()):
            nn.init.normal_(tensor)

    def places(self, xy):
        """Positions ``(..., 2)``, x and y in 0 .. 1, to ``(..., D)``: ``[sin, cos](2 pi (2 p - 1) G)``."""
        # Two products and a sum instead of a matrix product, which autocast would round.
        angle = 2 * math.pi * ((2 * xy.float() - 1).unsqueeze(-1) * self.frequencies.float()).sum(-2)
        return torch.cat([angle.sin(), angle.cos()], -1).to(self.frequencies.dtype)

    def grid(self, height, width):
        """Positions of the cells' centres of a map ``(D, height, width)``."""
        device = self.frequencies.device
        y = (torch.arange(height, device=device) + 0.5) / height
        x = (torch.arange(width, device=device) + 0.5) / width
        return self.places(torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)).permute(2, 0, 1)

    def forward(self, size, points=None, labels=None, boxes=None):
        """Prompts in pixels of an image of `size` (height, width) to tokens ``(N, P + 2, D)``.

        Args:
            points: ``(N, P, 2)``, x and y.
            labels: ``(N, P)``: 1 for points inside the object, 0 for points outside, -1 for no point (padding). None
                means 1 for all.
            boxes: ``(N, 4)``: x0, y0, x1, y1. Without boxes, a padding point takes their place.
        """
        scale = torch.tensor([size[1], size[0]], dtype=torch.float32, device=self.frequencies.device)
        tokens = []
        if points is not None:
            labels = torch.ones_like(points[..., 0]) if labels is None else labels
            if boxes is None:
                points, labels = F.pad(points, (0, 0, 0, 1)), F.pad(labels, (0, 1), value=-1)
            kind = self.point[labels.clamp(0).long()]
            tokens.append(torch.where(labels[..., None] < 0, self.no_point, self.places((points + 0.5) / scale) + kind))
        if boxes is not None:
            tokens.append(self.places((boxes.unflatten(-1, (2, 2)) + 0.5) / scale) + self.corner)
        return torch.cat(tokens, 1)


class Attention(nn.Module):
    """Attention of queries ``(N, T, D)`` to keys and values ``(N, S, D)``.

    Args:
        dim: Width D.
        inner: Total width of the heads.
        num_heads: Heads.
    """

    def __init__(self, dim: int, inner: int, num_heads: int = 8, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(dim, inner, **dd)
        self.k_proj = nn.Linear(dim, inner, **dd)
        self.v_proj = nn.Linear(dim, inner, **dd)
        self.out_proj = nn.Linear(inner, dim, **dd)

    def forward(self, q, k, v):
        q, k, v = (
            proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for proj, x in ((self.q_proj, q), (self.k_proj, k), (self.v_proj, v))
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TwoWayBlock(nn.Module):
    """Tokens attend to themselves, then to the image, then the image to them.

    Args:
        dim: Width D.
        first: Whether this is the first block: its self-attention uses no positions and replaces the residual stream.
    """

    def __init__(self, dim: int, first: bool = False, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.first = first
        self.self_attn = Attention(dim, dim, **dd)
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.token_to_image = Attention(dim, dim // 2, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, 8 * dim, act_layer=nn.ReLU, **dd)
        self.norm3 = nn.LayerNorm(dim, **dd)
        self.image_to_token = Attention(dim, dim // 2, **dd)
        self.norm4 = nn.LayerNorm(dim, **dd)

    def forward(self, tokens, image, token_places, image_places):
        """Updates tokens ``(N, T, D)`` and image ``(N, S, D)``; `*_places` are added to queries and keys."""
        if self.first:
            tokens = self.self_attn(tokens, tokens, tokens)
        else:
            q = tokens + token_places
            tokens = tokens + self.self_attn(q, q, tokens)
        tokens = self.norm1(tokens)
        k = image + image_places
        tokens = self.norm2(tokens + self.token_to_image(tokens + token_places, k, image))
        tokens = self.norm3(tokens + self.mlp(tokens))
        image = self.norm4(image + self.image_to_token(k, tokens + token_places, tokens))
        return tokens, image


def mlp3(dim, dim_out, device=None, dtype=None):
    """Three linear maps with ReLU between."""
    dd: dict = {"device": device, "dtype": dtype}
    return nn.Sequential(
        nn.Linear(dim, dim, **dd), nn.ReLU(), nn.Linear(dim, dim, **dd), nn.ReLU(), nn.Linear(dim, dim_out, **dd)
    )


class MaskDecoder(nn.Module):
    """Turns the image's map and its prompts into masks: ``mask = MLP(mask token) . F``, F at stride 4.

    F is the upsampled attended image, plus convolutions of it together with the backbone's maps at strides 4 and 8.

    Args:
        dim: Width D of the tokens.
        fine, middle: Channels of the maps of strides 4 and 8.
        depth: Two-way blocks.
    """

    def __init__(self, dim: int, fine: int, middle: int, depth: int = 2, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        width, out = dim // 4, dim // 8

        def refine(first):
            return nn.Sequential(first, LayerNorm2d(width, **dd), nn.GELU(), nn.Conv2d(width, out, 3, padding=1, **dd))

        self.score_token = nn.Parameter(torch.empty(dim, **dd))
        self.mask_token = nn.Parameter(torch.empty(dim, **dd))
        self.blocks = nn.ModuleList(TwoWayBlock(dim, first=i == 0, **dd) for i in range(depth))
        self.final_attn = Attention(dim, dim // 2, **dd)
        self.final_norm = nn.LayerNorm(dim, **dd)
        self.upscale = nn.Sequential(
            nn.ConvTranspose2d(dim, width, 2, 2, **dd),
            LayerNorm2d(width, **dd),
            nn.GELU(),
            nn.ConvTranspose2d(width, out, 2, 2, **dd),
            nn.GELU(),
        )
        self.fine = refine(nn.Conv2d(fine, width, 3, padding=1, **dd))
        self.middle = refine(nn.ConvTranspose2d(middle, width, 2, 2, **dd))
        self.mix = refine(nn.Conv2d(3 * out, width, 3, padding=1, **dd))
        self.mask_head = mlp3(dim, out, **dd)
        self.score_head = mlp3(dim, 1, **dd)
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.normal_(self.score_token)
        nn.init.normal_(self.mask_token)

    def forward(self, image, places, prompts, fine, middle, index):
        """Mask logits ``(N, 4 H, 4 W)`` and scores ``(N,)``.

        Args:
            image: The images' maps ``(B, D, H, W)``, with the "no mask" embedding added.
            places: Position encodings of the map's cells ``(D, H, W)``.
            prompts: Tokens ``(N, P, D)``.
            fine, middle: The images' maps ``(B, C, 4 H, 4 W)`` and ``(B, C', 2 H, 2 W)``.
            index: The image of each prompt ``(N,)``.
        """
        grid = image.shape[2:]
        own = torch.stack([self.score_token, self.mask_token]).expand(len(prompts), -1, -1)
        token_places = torch.cat([own, prompts], 1)
        image_places = places.flatten(1).t()
        tokens, x = token_places, image.flatten(2).transpose(1, 2)[index]
        for block in self.blocks:
            tokens, x = block(tokens, x, token_places, image_places)
        attended = self.final_attn(tokens + token_places, x + image_places, x)
        score, mask = self.final_norm(tokens + attended)[:, :2].unbind(1)
        features = self.upscale(x.transpose(1, 2).unflatten(2, grid))
        sharp = torch.cat([self.middle(middle), self.fine(fine)], 1)[index]
        features = features + self.mix(torch.cat([features, sharp], 1))
        return torch.einsum("nc,nchw->nhw", self.mask_head(mask), features), self.score_head(score).squeeze(1)


class Prediction(NamedTuple):
    """Masks of one image, one per prompt.

    Attributes:
        masks: ``(N, H, W)``, bool.
        scores: Their estimated IoU with the true masks ``(N,)``.
        logits: ``(N, H, W)``; the mask is where they exceed 0.
    """

    masks: torch.Tensor
    scores: torch.Tensor
    logits: torch.Tensor


def _tensor(name, value, shape, device):
    """A prompt as a float32 tensor; `shape` in words and sizes, None for any size."""
    value = torch.as_tensor(value, dtype=torch.float32, device=device)
    if value.dim() != len(shape) or any(n not in (None, size) for n, size in zip(shape, value.shape, strict=True)):
        expected = ", ".join("NP"[i] if n is None else str(n) for i, n in enumerate(shape))
        raise ValueError(f"{name}: expected ({expected}), got {tuple(value.shape)}")
    if not value.isfinite().all():
        raise ValueError(f"{name}: expected finite numbers, got {value[~value.isfinite()][0].item()}")
    return value


def check_prompts(size, points=None, labels=None, boxes=None, device=None):
    """Prompts as tensors, checked against an image of `size` (height, width); see `RWKVSAM.predict`.

    Raises:
        ValueError: neither points nor boxes; labels without points; wrong shapes; labels other
            than 1, 0 and -1, or only -1 without a box; points outside of the image; boxes that are empty or outside.
    """
    height, width = size
    if points is None and boxes is None:
        raise ValueError("points, boxes: expected at least one of them, got neither")
    if points is None and labels is not None:
        raise ValueError("points: expected with labels, got None")
    if points is not None:
        points = _tensor("points", points, (None, None, 2), device)
        labels = torch.ones_like(points[..., 0]) if labels is None else labels
        labels = _tensor("labels", labels, tuple(points.shape[:2]), device)
        if points.shape[1] == 0:
            raise ValueError("points: expected at least one a prompt, got (N, 0, 2)")
        known = (labels == 1) | (labels == 0) | (labels == -1)
        if not known.all():
            raise ValueError(
                f"labels: expected 1 (object), 0 (background) or -1 (none), got {labels[~known][0].item()}"
            )
        outside = ((points < 0) | (points > points.new_tensor([width, height]))).any(-1) & (labels >= 0)
        if outside.any():
            raise ValueError(
                f"points: expected x in 0 .. {width} and y in 0 .. {height}, got {points[outside][0].tolist()}"
            )
        if boxes is None and (labels < 0).all(1).any():
            raise ValueError("labels: expected a point with label 0 or 1 in every prompt without a box, got -1 alone")
    if boxes is not None:
        boxes = _tensor("boxes", boxes, (None if points is None else len(points), 4), device)
        x0, y0, x1, y1 = boxes.unbind(1)
        bad = (x0 >= x1) | (y0 >= y1) | (x1 <= 0) | (y1 <= 0) | (x0 >= width) | (y0 >= height)
        if bad.any():
            raise ValueError(
                f"boxes: expected x0 < x1, y0 < y1 and a part of the image of {width} x {height}, "
                f"got {boxes[bad][0].tolist()}"
            )
    return points, labels, boxes


class EncodedImage(NamedTuple):
    """The result of `RWKVSAM.encode_image`, for `RWKVSAM.predict`.

    Attributes:
        maps: The output of `RWKVSAM.encode` for the scaled image.
        size: Height and width of the image.
        scaled: Height and width of the image inside the encoded square.
    """

    maps: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    size: tuple[int, int]
    scaled: tuple[int, int]


class RWKVSAM(nn.Module):
    """RWKV-SAM (arXiv 2406.19369): images and prompts to masks.

    Args:
        backbone_name: timm name of a backbone with features at strides 4, 8 and 16; the last one of a stride is used.
        img_size: Side of the square that `predict` scales images into, a multiple of 16; or that number twice.
        dim: Width of prompts and decoder.
        backbone_args: Further arguments of the backbone, as in `timm.create_model` (including `pretrained`).

    Raises:
        ValueError: the backbone lacks a stride; `dim` or `img_size` is not a multiple of 16.
    """

    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        backbone_name: str = "rwkvsam_backbone_s",
        img_size: int | tuple[int, int] = 1024,
        dim: int = 256,
        backbone_args: dict | None = None,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        if dim % 16:
            raise ValueError(f"dim: expected a multiple of 16, got {dim}")
        height, self.img_size = to_2tuple(img_size)
        if height != self.img_size or height % 16:
            raise ValueError(f"img_size: expected a multiple of 16, the side of a square, got {img_size}")
        self.in_chans, self.num_classes, self.num_features = 3, 1, dim
        self.backbone = timm.create_model(backbone_name, num_classes=0, **(backbone_args or {}), **dd)
        self.feature_info = self.backbone.feature_info
        strides = {info["reduction"]: i for i, info in enumerate(self.feature_info)}
        if not {4, 8, 16} <= strides.keys():
            raise ValueError(
                f"backbone_name: expected features of strides 4, 8 and 16, got {sorted(strides)} of {backbone_name!r}"
            )
        self.taps = [strides[s] for s in (4, 8, 16)]
        fine, middle, coarse = (self.feature_info[i]["num_chs"] for i in self.taps)
        self.neck = nn.Sequential(
            nn.Conv2d(coarse, dim, 1, bias=False, **dd),
            LayerNorm2d(dim, **dd),
            nn.Conv2d(dim, dim, 3, padding=1, bias=False, **dd),
            LayerNorm2d(dim, **dd),
        )
        self.prompt_encoder = PromptEncoder(dim, **dd)
        self.mask_decoder = MaskDecoder(dim, fine, middle, **dd)

    def encode(self, images):
        """Normalised images ``(B, 3, H, W)`` to maps of strides 4 and 8 and the embedding ``(B, D, H / 16, W / 16)``.

        Raises:
            ValueError: the sides are not multiples of 16.
        """
        if images.dim() != 4 or images.shape[2] % 16 or images.shape[3] % 16:
            raise ValueError(f"images: expected (B, C, H, W), H and W multiples of 16, got {tuple(images.shape)}")
        fine, middle, coarse = self.backbone.forward_intermediates(images, indices=self.taps, intermediates_only=True)
        return fine, middle, self.neck(coarse)

    def decode(self, maps, points=None, labels=None, boxes=None, index=None):
        """Maps from `encode` and prompts to mask logits ``(N, H / 4, W / 4)`` and scores ``(N,)``; see `forward`."""
        fine, middle, image = maps
        size = [4 * n for n in fine.shape[2:]]
        if points is None and boxes is None:
            prompts = image.new_empty(len(image), 0, image.shape[1])
            index = torch.arange(len(image), device=image.device)
        else:
            prompts = self.prompt_encoder(size, points, labels, boxes)
        if index is None:
            if len(image) != 1:
                raise ValueError(f"index: expected with {len(image)} images, got None")
            index = torch.zeros(len(prompts), dtype=torch.long, device=image.device)
        image = image + self.prompt_encoder.no_mask[:, None, None]
        places = self.prompt_encoder.grid(*image.shape[2:])
        return self.mask_decoder(image, places, prompts, fine, middle, index)

    def forward_intermediates(self, images, *prompts, **kwargs):
        """The backbone's maps: its own `forward_intermediates`. Prompts, as in `forward`, have no effect."""
        return self.backbone.forward_intermediates(images, **kwargs)

    def forward(self, images, points=None, labels=None, boxes=None, index=None):
        """Mask logits at a quarter of the images' sides ``(N, H / 4, W / 4)`` and scores ``(N,)`` for N prompts.

        Args:
            images: ``(B, 3, H, W)``, normalised by ImageNet's mean and standard deviation, sides multiples of 16.
            points: ``(N, P, 2)``, x and y in pixels.
            labels: ``(N, P)``: 1 for points inside the object, 0 for points outside, -1 for no point (padding). None
                means 1 for all.
            boxes: ``(N, 4)``: x0, y0, x1, y1 in pixels.
            index: The image of each prompt ``(N,)``; None for one image.

        Without points and boxes there is one mask per image, chosen by the decoder without a prompt.

        Raises:
            ValueError: the sides are not multiples of 16; there are several images and no `index`.
        """
        return self.decode(self.encode(images), points, labels, boxes, index)

    def prepare(self, image):
        """Prepares one image for `encode`: scales its longer side to `img_size`, normalises it, and pads it with 0 on
        the right and below.

        Args:
            image: RGB ``(3, H, W)``: uint8, or floats in 0 .. 1.

        Returns:
            ``(1, 3, img_size, img_size)``, and height and width of the image inside it.

        Raises:
            ValueError: the shape or dtype is wrong.
        """
        if not isinstance(image, torch.Tensor) or image.dim() != 3 or image.shape[0] != 3 or not image.numel():
            got = tuple(image.shape) if hasattr(image, "shape") else type(image).__name__
            raise ValueError(f"image: expected a tensor (3, H, W), got {got}")
        if image.dtype != torch.uint8 and not image.is_floating_point():
            raise ValueError(f"image: expected uint8 or floats in 0 .. 1, got {image.dtype}")
        size, like = image.shape[1:], self.prompt_encoder.frequencies
        x = image.to(like.device, torch.float32) / (255 if image.dtype == torch.uint8 else 1)
        height, width = scaled = tuple(max(1, round(n * self.img_size / max(size))) for n in size)
        x = F.interpolate(x[None], scaled, mode="bilinear", antialias=True)
        x = normalize(x, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD).to(like.dtype)
        return F.pad(x, (0, self.img_size - width, 0, self.img_size - height)), scaled

    @torch.inference_mode()
    def encode_image(self, image):
        """Encodes one image, as taken by `prepare`, for `predict`: an `EncodedImage`."""
        x, scaled = self.prepare(image)
        return EncodedImage(self.encode(x), tuple(image.shape[1:]), scaled)

    @torch.inference_mode()
    def predict(self, image, points=None, labels=None, boxes=None):
        """Masks for the prompts, at the image's size.

        Call `eval()` first if the backbone has dropout or stochastic depth.

        Args:
            image: RGB ``(3, H, W)``: uint8, or floats in 0 .. 1; or the result of `encode_image`, to prompt the same
                image several times.
            points: ``(N, P, 2)``, x and y in pixels of the image.
            labels: ``(N, P)``: 1 for points inside the object, 0 for points outside, -1 for no point (padding). None
                means 1 for all.
            boxes: ``(N, 4)``: x0, y0, x1, y1 in pixels of the image; with points, both describe one object.

        Returns:
            A `Prediction` of N masks.

        Raises:
            ValueError: the image's shape or dtype is wrong; prompts do not fit it, see `check_prompts`.
        """
        device = self.prompt_encoder.frequencies.device
        if not isinstance(image, EncodedImage):
            image = self.encode_image(image)
        points, labels, boxes = check_prompts(image.size, points, labels, boxes, device)
        (height, width), scaled = image.size, image.scaled
        scale = torch.tensor([scaled[1] / width, scaled[0] / height], device=device)
        points = None if points is None else points * scale
        boxes = None if boxes is None else boxes * scale.repeat(2)
        logits, scores = self.decode(image.maps, points, labels, boxes)
        logits = F.interpolate(logits[:, None].float(), scale_factor=4, mode="bilinear")
        logits = F.interpolate(logits[..., : scaled[0], : scaled[1]], (height, width), mode="bilinear")[:, 0]
        return Prediction(logits > 0, scores.float(), logits)

    def init_weights(self, needs_reset=True):
        """Fills the parameters; with `needs_reset` (after `to_empty`) also those that constructors fill."""
        for module in self.modules() if needs_reset else ():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        self.backbone.init_weights(needs_reset)

    @torch.jit.ignore
    def no_weight_decay(self):
        """The backbone's, and the prompts' learned vectors."""
        backbone = {f"backbone.{name}" for name in self.backbone.no_weight_decay()}
        return backbone | {f"prompt_encoder.{name}" for name, _ in self.prompt_encoder.named_parameters()}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable=True):
        self.backbone.set_grad_checkpointing(enable)


_RENAMES = [
    (r"^neck\.out_proj\.", "neck."),
    (r"^pe\.pe_layer\.positional_encoding_gaussian_matrix$", "prompt_encoder.frequencies"),
    (r"^pe\.not_a_point_embed\.weight$", "prompt_encoder.no_point"),
    (r"^pe\.no_mask_embed\.weight$", "prompt_encoder.no_mask"),
    (r"^mask_decoder\.mask_decoder\.", "mask_decoder."),
    (r"\.iou_token\.weight$", ".score_token"),
    (r"\.mask_tokens\.weight$", ".mask_token"),
    (r"\.transformer\.layers\.", ".blocks."),
    (r"\.cross_attn_", "."),
    (r"\.mlp\.lin", ".mlp.fc"),
    (r"\.transformer\.final_attn_token_to_image\.", ".final_attn."),
    (r"\.transformer\.norm_final_attn\.", ".final_norm."),
    (r"\.output_upscaling\.", ".upscale."),
    (r"\.hr_feat_proj\.", ".fine."),
    (r"\.mr_feat_proj\.", ".middle."),
    (r"\.mix_feat_proj\.", ".mix."),
    (r"\.output_hypernetworks_mlps\.0\.layers\.(\d)\.", lambda m: f".mask_head.{2 * int(m[1])}."),
    (r"\.iou_prediction_head\.layers\.(\d)\.", lambda m: f".score_head.{2 * int(m[1])}."),
]
_FIRST_ROWS = ("mask_decoder.mask_token", "mask_decoder.score_head.4.weight", "mask_decoder.score_head.4.bias")


def checkpoint_filter_fn(state_dict, model):
    """Converts the authors' state dict of the whole segmenter to ours.

    Unused parts are left out: the encoder of mask prompts, and all mask tokens and scores except the first.
    """
    state_dict = unwrap_state_dict(state_dict)
    if "prompt_encoder.frequencies" in state_dict:
        return state_dict
    backbone = {key: value for key, value in state_dict.items() if key.startswith("backbone.")}
    out = {
        rename(key, _RENAMES): value
        for key, value in state_dict.items()
        if key not in backbone and not key.startswith(("pe.mask_downscaling.", "pe.point_embeddings."))
    }
    kinds = torch.cat([state_dict[f"pe.point_embeddings.{i}.weight"] for i in range(4)])
    out |= {"prompt_encoder.point": kinds[:2], "prompt_encoder.corner": kinds[2:]}
    out |= {key: out[key][:1] for key in _FIRST_ROWS}
    out |= {f"backbone.{key}": value for key, value in convert_backbone(backbone, model.backbone).items()}
    return reshape_as(out, model)


default_cfgs = generate_default_cfgs(
    {
        "rwkvsam": dict(
            num_classes=1,
            input_size=(3, 1024, 1024),
            pool_size=None,
            crop_pct=1.0,
            interpolation="bilinear",
            mean=IMAGENET_DEFAULT_MEAN,
            std=IMAGENET_DEFAULT_STD,
            first_conv="backbone.stem.conv1",
            classifier="mask_decoder.mask_head.4",
            origin_url="https://github.com/HarborYuan/ovsam",
            paper_ids="arXiv:2406.19369",
        )
    }
)


@register_model
def rwkvsam(pretrained=False, **kwargs):
    """RWKV-SAM with the small backbone."""
    if kwargs.pop("in_chans", 3) != 3:
        raise ValueError("in_chans: RWKV-SAM takes RGB images, expected 3")
    return build_model_with_cfg(
        RWKVSAM,
        "rwkvsam",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        kwargs_filter=("num_classes", "global_pool", "in_chans"),
        **kwargs,
    )
