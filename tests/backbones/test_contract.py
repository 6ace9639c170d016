"""The contract that every classification model of the zoo keeps, written once for all of them.

The models come from the registry, so a new family adds no test of its own. What is cheap (shapes and names, on the meta
device) and one forward pass run for every variant; the rest runs for the first variant of each model class, which is
its smallest, with fewer blocks. A family that cannot keep a clause says so in `EXCEPTIONS`, and the clause is then
expected to fail.
"""

import copy
import fnmatch
import inspect
import math
import pickle

import pytest
import safetensors.torch
import timm
import torch
from timm.models import get_pretrained_cfg_value, group_parameters, model_entrypoint
from timm.models._features_fx import GraphExtractNet, get_graph_node_names
from timm.models.vision_transformer import VisionTransformer
from timm.utils import freeze
from torch import nn

from linzoo.backbones import list_models
from linzoo.backbones.layers import fuse_for_inference
from linzoo.backbones.layers.without_memory import Unfilled

# {wildcard of model names: {name of the test: why the family cannot keep this clause}}
EXCEPTIONS = {
    "s4nd*": {
        "test_pretrained_with_another_head_and_one_channel": "kernels of the three channels have no kernel as their sum"
    }
}

SIZE = (64, 96)  # a multiple of 32, and not square: height and width must not be confused anywhere
FEW_BLOCKS = dict(depths=(1, 1, 2, 1), depth=4, modules=(1, 1, 1))
FEWEST_BLOCKS = dict(depths=(1, 1, 1, 1), depth=2)  # for tracers, which take long
ODD_SIZES = [(33, 47), (65, 93), (100, 37)]
# A C++ compiler takes up to two minutes a model: these stand for all, which test_compile traces whole, and
# ops/test_compile.py compiles every operator.
COMPILED_TO_CODE = ["s4d_pixel_s", "vmamba_t", "vrwkv6_t"]


def representatives():
    """The first variant of each model class."""
    classes = {}
    for name in sorted(list_models(), key=lambda n: model_entrypoint(n).__code__.co_firstlineno):
        classes.setdefault(type(create(name, device="meta")), name)
    return sorted(classes.values())


def create(name, size=SIZE, **kwargs):
    if get_pretrained_cfg_value(name, "fixed_input_size"):
        kwargs["img_size"] = size
    with Unfilled():
        return timm.create_model(name, **kwargs)


def few_blocks(name, size=SIZE):
    """Keywords that leave the model its widths but fewer blocks."""
    kind = type(create(name, size, device="meta"))
    parameters = dict(inspect.signature(kind).parameters)
    if "kwargs" in parameters:  # passed on to the class it derives from
        parameters |= inspect.signature(kind.__base__).parameters
    few = {k: v for k, v in FEW_BLOCKS.items() if k in parameters}
    if "routes" in parameters:  # those of every block, or of every block of four stages
        few["routes"] = [r if isinstance(r, str) else r[:1] for r in parameters["routes"].default[:4]]
    return few


def create_small(name, size=SIZE, **kwargs):
    """The model with fewer blocks: what is the same for every block need not be shown for all."""
    few = few_blocks(name, size)
    if kwargs.get("features_only") and ("depth" in few or isinstance(few.get("routes", [[]])[0], str)):
        kwargs.setdefault("out_indices", (0, 1, 3))  # of an isotropic model's four blocks
    return create(name, size, **(few | kwargs))


def images(batch=2, size=SIZE, in_chans=3, **kwargs):
    return torch.randn(batch, in_chans, *size, **kwargs)


def as_tuple(x):
    return tuple(x) if isinstance(x, (tuple, list)) else (x,)


def total(outputs):
    """A scalar that every element of every output moves differently."""
    generator = torch.Generator().manual_seed(1)
    return sum((y.float() * torch.randn(y.shape, generator=generator)).mean() for y in as_tuple(outputs))


def gradients(model, x):
    model.zero_grad(set_to_none=True)
    total(model(x)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same_gradients(actual, expected, tol=1e-4):
    """Every gradient within `tol` of the other's norm, up to rounding of the largest."""
    floor = 1e-7 * max(g.norm() for g in expected.values())
    off = {n: f"{(g - expected[n]).norm() / expected[n].norm():.1e}" for n, g in actual.items()
           if (g - expected[n]).norm() > tol * expected[n].norm() + floor}  # fmt: skip
    assert not off, f"gradients differ by (relative): {off}"


def assert_gradients(model):
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing, f"no gradient: {missing}"
    wrong = [name for name, p in model.named_parameters() if not p.grad.isfinite().all()]
    assert not wrong, f"gradient not finite: {wrong}"


def assert_near(actual, expected, tol=1e-5):
    """max |actual - expected| <= tol * std(expected), output by output."""
    actual, expected = as_tuple(actual), as_tuple(expected)
    assert [y.shape for y in actual] == [y.shape for y in expected]
    for a, e in zip(actual, expected, strict=True):
        a, e = a.double(), e.double()
        error, scale = (a - e).abs().max(), e.std()
        assert error <= tol * scale, f"error {error:.2e}, {error / scale:.1e} of the standard deviation, allowed {tol}"


def assert_close_in_bf16(actual, expected):
    """Cosine similarity over 0.99: eight bits of mantissa move single values, not the direction of the whole."""
    assert actual.isfinite().all()
    assert torch.cosine_similarity(actual.double().flatten(), expected.double().flatten(), dim=0) > 0.99


@pytest.fixture(scope="module", params=list_models())
def name(request):
    """Every classification model that the zoo registers."""
    return request.param


@pytest.fixture(scope="module", params=representatives())
def family(request):
    """One model a family."""
    return request.param


@pytest.fixture(autouse=True)
def exceptions(request):
    model = next((request.getfixturevalue(f) for f in ("name", "family") if f in request.fixturenames), "")
    for pattern, tests in EXCEPTIONS.items():
        if fnmatch.fnmatch(model, pattern) and request.node.originalname in tests:
            request.applymarker(pytest.mark.xfail(strict=True, reason=tests[request.node.originalname]))


@pytest.fixture(scope="module")
def shared_meta(name):
    return create(name, size=get_pretrained_cfg_value(name, "input_size")[1:], device="meta").eval()


@pytest.fixture
def meta(shared_meta):
    """A copy of the model on the meta device: shapes without arithmetic."""
    return copy.deepcopy(shared_meta)


@pytest.fixture(scope="module")
def shared_model(family):
    torch.manual_seed(0)
    return create_small(family).eval()


@pytest.fixture
def model(shared_model):
    """A copy of the family's model, in eval mode."""
    return copy.deepcopy(shared_model)


@pytest.fixture
def fewest(family):
    """The family's model with a block a stage, in eval mode."""
    return create_small(family, **{k: v for k, v in FEWEST_BLOCKS.items() if k in few_blocks(family)}).eval()


# --- every variant, shapes and names --------------------------------------------------------------------------------


def test_default_cfg_is_true(meta):
    cfg, state = meta.default_cfg, meta.state_dict()
    channels, height, width = cfg["input_size"]
    assert meta.num_classes == cfg["num_classes"]
    assert meta.in_chans == channels == len(cfg["mean"]) == len(cfg["std"])
    for layer in as_tuple(cfg["first_conv"]):
        assert state[f"{layer}.weight"].shape[1] == channels
    for layer in as_tuple(cfg["classifier"]):
        assert state[f"{layer}.weight"].shape[0] == cfg["num_classes"]
    assert cfg.get("paper_ids"), "paper_ids is empty"
    assert cfg.get("license") or not (cfg.get("url") or cfg.get("hf_hub_id")), "weights without a licence"
    if cfg["pool_size"]:
        maps = meta.forward_intermediates(images(1, (height, width), device="meta"), intermediates_only=True)
        assert tuple(maps[-1].shape[2:]) == tuple(cfg["pool_size"])


def test_shapes(meta):
    x = images(2, meta.default_cfg["input_size"][1:], device="meta")
    features = meta.forward_features(x)
    assert meta(x).shape == (2, meta.num_classes)
    assert meta.forward_head(features).shape == (2, meta.num_classes)
    assert meta.forward_head(features, pre_logits=True).shape == (2, meta.head_hidden_size)
    if isinstance(features, torch.Tensor):
        axis = -1 if features.ndim == 3 or getattr(meta, "output_fmt", "NCHW") == "NHWC" else 1
        assert features.shape[axis] == meta.num_features


def test_parameter_groups(meta):
    names = {name for name, _ in meta.named_parameters()}
    for coarse in (False, True):
        groups = group_parameters(meta, meta.group_matcher(coarse=coarse))
        assert len(groups) > 1
        assert sorted(n for group in groups.values() for n in group) == sorted(names)
    unknown = set(meta.no_weight_decay()) - names if hasattr(meta, "no_weight_decay") else set()
    assert not unknown, f"no_weight_decay names no parameter: {unknown}"


def test_features_only(name):
    model = create(name, features_only=True, device="meta").eval()
    info = model.feature_info
    maps = model(images(2, device="meta"))
    assert len(maps) >= 3
    net = getattr(model, "model", model)
    overlap = net.patch_size - net.stride if hasattr(net, "patch_size") else 0  # patches are not padded
    assert [tuple(y.shape) for y in maps] == [
        (2, channels, *(math.ceil((s - overlap) / reduction) for s in SIZE))
        for channels, reduction in zip(info.channels(), info.reduction(), strict=True)
    ]
    last = create(name, features_only=True, out_indices=(-1,), device="meta").eval()
    assert [y.shape for y in last(images(2, device="meta"))] == [maps[-1].shape]


def test_forward(name):
    model = create(name).eval()
    with torch.inference_mode():
        y = model(images(1))
    assert y.shape == (1, model.num_classes)
    assert y.isfinite().all()
    assert y.std() > 0


# --- one variant a family: classifiers, devices ---------------------------------------------------------------------


def test_reset_classifier(family):
    meta, x = create_small(family, device="meta").eval(), images(2, device="meta")
    meta.reset_classifier(7)
    assert meta.num_classes == 7
    layers = [m for fc in as_tuple(meta.get_classifier()) for m in fc.modules() if isinstance(m, nn.Linear)]
    assert layers
    assert {fc.out_features for fc in layers} == {7}
    assert meta(x).shape == (2, 7)

    meta.reset_classifier(0)
    assert meta.num_classes == 0
    assert meta(x).shape == (2, meta.head_hidden_size), "without classifier the output is what the classifier saw"

    meta.reset_classifier(0, "")
    assert meta(x).ndim > 2, "global_pool='' leaves the positions"
    meta.reset_classifier(0)
    assert meta(x).ndim > 2, "a reset that names no pooling keeps the pooling"


def test_created_without_classifier(family):
    model = create_small(family, num_classes=0, device="meta").eval()
    assert model(images(2, device="meta")).shape == (2, model.head_hidden_size)


def test_unknown_keyword(family):
    with pytest.raises(TypeError):
        create_small(family, no_such_argument=1, device="meta")


def test_factory_device_and_dtype(family):
    model = create_small(family, device="meta", dtype=torch.bfloat16)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    assert [n for n, t in tensors if not t.is_meta] == []
    assert [n for n, t in tensors if t.is_floating_point() and t.dtype != torch.bfloat16] == []
    assert model.eval()(images(2, device="meta", dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_factory_device_is_not_the_default_device(family):
    """Everything is made where `device` says, not where a surrounding default says."""
    with torch.device("meta"):
        model = create_small(family, device="cpu")
    assert [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta] == []


# --- one variant a family: values -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ODD_SIZES, ids="{0[0]}x{0[1]}".format)
def test_any_size(family, size):
    model = create_small(family, size).eval()
    x = images(2, size)
    with torch.inference_mode():
        y = model(x)
        maps = create_small(family, size, features_only=True).eval()(x)
        assert_near(model(x[:1]), y[:1], 1e-3)
    assert y.isfinite().all()
    assert all(m.isfinite().all() for m in maps)


def test_forward_is_features_then_head(model):
    x = images()
    with torch.inference_mode():
        features = model.forward_features(x)
        y = model(x)
        assert_near(model.forward_head(features), y)
        classifiers = as_tuple(model.get_classifier())
        hidden = model.forward_head(features, pre_logits=True)
        if isinstance(classifiers[0], nn.Linear) and len(classifiers) == 1:
            assert_near(classifiers[0](hidden), y)
        model.reset_classifier(0)
        assert_near(model(x), hidden)


def test_channels_last_input(model):
    x = images()
    with torch.inference_mode():
        assert_near(model(x.contiguous(memory_format=torch.channels_last)), model(x), 1e-4)


def test_channels_last_model(model):
    x = images().contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        y = model(x)
        assert_near(model.to(memory_format=torch.channels_last)(x), y, 1e-4)


def test_no_image(model):
    """A batch of none gives logits of none, and gradients of 0."""
    y = model(images(0))
    assert y.shape == (0, model.num_classes)
    y.sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()]


@pytest.mark.filterwarnings("ignore")  # that sizes become constants
def test_jit(model):
    """TorchScript's tracer records the model for one size; its compiler is refused in one line."""
    x = images()
    with torch.no_grad():
        traced = torch.jit.trace(model, images(), check_trace=False)
        assert_near(traced(x), model(x), 1e-4)
    with pytest.raises(NotImplementedError, match=r"^torch.jit.script\(.*\): .* torch.export.export\(.*$"):
        torch.jit.script(model)


def test_forward_intermediates(model):
    x, info = images(), model.feature_info
    stages = [i if isinstance(i, dict) else vars(i) for i in info]
    with torch.inference_mode():
        final, maps = model.forward_intermediates(x)
        assert_near(final, model.forward_features(x))
        assert [y.shape[1] for y in maps] == [s["num_chs"] for s in stages]
        only = model.forward_intermediates(x, intermediates_only=True)
        assert_near(only, maps)

        if getattr(model, "output_fmt", "NLC") == "NHWC":
            nhwc = model.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True)
            assert_near([y.permute(0, 3, 1, 2) for y in nhwc], maps)
        else:
            nlc = model.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
            assert_near(nlc, [y.flatten(2).transpose(1, 2) for y in maps])

        last = len(maps) - 1
        for indices, expected in {(0, last): [maps[0], maps[last]], (-1,): [maps[last]], 2: maps[-2:]}.items():
            assert_near(model.forward_intermediates(x, indices=indices, intermediates_only=True), expected)

        normed = model.forward_intermediates(x, norm=True, intermediates_only=True)
        assert [y.shape for y in normed] == [y.shape for y in maps]
        assert all(y.isfinite().all() for y in normed)
    with pytest.raises((AssertionError, ValueError)):
        model.forward_intermediates(x, output_fmt="HWCN")
    with pytest.raises((AssertionError, ValueError)):
        model.forward_intermediates(x, indices=[len(maps)])


def test_stop_early(model):
    x, reached = images(), []
    modules = [i["module"] for i in model.feature_info]
    model.get_submodule(modules[-1]).register_forward_hook(lambda *_: reached.append(modules[-1]))
    with torch.inference_mode():
        expected = model.forward_intermediates(x, indices=[0], intermediates_only=True)
        assert reached, f"feature_info names {modules[-1]}, which the forward pass does not call"
        reached.clear()
        actual = model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)
    assert_near(actual, expected)
    assert not reached, f"stop_early ran on to {reached}"


def test_prune_intermediate_layers(model):
    x = images()
    with torch.inference_mode():
        maps = model.forward_intermediates(x, intermediates_only=True)
    for index in range(len(maps)):
        pruned = copy.deepcopy(model)
        taken = pruned.prune_intermediate_layers([index], prune_norm=True, prune_head=True)
        assert list(taken) == [index]
        assert pruned(x).shape[0] == len(x), "what is left runs as a model too"
        features = pruned.forward_intermediates(x, indices=taken, intermediates_only=True)
        assert_near(features, [maps[index]])
        total(features).backward()
        assert_gradients(pruned)


@pytest.mark.parametrize("pool", ["max", "avgmax", "catavgmax"])
def test_other_pooling(family, pool):
    """`head_hidden_size` is what the classifier is given, at creation and after a reset."""
    meta, x = create_small(family, device="meta").eval(), images(device="meta")
    if pool == "catavgmax" and isinstance(meta, VisionTransformer):
        with pytest.raises(AssertionError, match="pooling"):
            meta.reset_classifier(7, pool)
        return
    meta.reset_classifier(7, pool)
    for model in (meta, create_small(family, global_pool=pool, num_classes=7, device="meta").eval()):
        pooled = model.forward_head(model.forward_features(x), pre_logits=True)
        assert pooled.shape == (2, model.head_hidden_size)
        assert model(x).shape == (2, 7)
        model.reset_classifier(0)
        assert model(x).shape == (2, model.head_hidden_size)


def test_concatenated_pooling(model):
    """Means and maxima beside each other, the same as each of them alone."""
    if isinstance(model, VisionTransformer):
        return  # timm's ViT has no concatenated pooling
    x = images()
    with torch.inference_mode():
        halves = []
        for pool in ("avg", "max"):
            model.reset_classifier(0, pool)
            halves.append(model(x))
        model.reset_classifier(0, "catavgmax")
        assert_near(model(x), torch.cat(halves, 1))


def test_pruning_keeps_the_classifier(model):
    x = images()
    with torch.inference_mode():
        y = model(x)
        model.prune_intermediate_layers([len(model.feature_info) - 1], prune_head=False)
        assert_near(model(x), y)


@pytest.mark.parametrize("feature_cls", ["fx", "hook", "list", "dict"])
def test_feature_classes(model, family, feature_cls, tmp_path):
    """timm's other extractors give the stages' maps of a pyramid, in either layout."""
    if getattr(model, "output_fmt", None) != "NHWC":
        return  # tokens are no maps: these extractors cannot tell their grid
    path, x = tmp_path / "weights.safetensors", images()
    safetensors.torch.save_file(model.state_dict(), path)
    weights = dict(pretrained=True, pretrained_cfg_overlay={"file": str(path)})
    features = create_small(family, features_only=True, feature_cls=feature_cls, **weights).eval()
    with torch.inference_mode():
        maps, expected = features(x), model.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True)
    maps = list(maps.values()) if isinstance(maps, dict) else maps
    if maps[0].shape != expected[0].shape:
        expected = [y.permute(0, 3, 1, 2) for y in expected]
    assert_near(maps, expected, 1e-4)


def test_pruned_tap_equals_features_only_with_weights(model, family, tmp_path):
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(model.state_dict(), path)
    x = images()
    for feature_cls in ({}, {"feature_cls": "getter"}):
        features = create_small(
            family,
            features_only=True,
            out_indices=(1, 2),
            pretrained=True,
            pretrained_cfg_overlay={"file": str(path)},
            **feature_cls,
        ).eval()
        with torch.inference_mode():
            assert_near(features(x), model.forward_intermediates(x, indices=[1, 2], intermediates_only=True))


def test_features_only_checkpointing(family):
    features = create_small(family, features_only=True).eval()
    x = images()
    plain = gradients(features, x)
    assert_gradients(features)
    getattr(features, "model", features).set_grad_checkpointing(True)
    assert_same_gradients(gradients(features, x), plain)


def test_grad_checkpointing(model):
    x = images()
    y, plain = model(x), gradients(model, x)
    model.set_grad_checkpointing(True)
    assert_near(model(x), y)
    assert_same_gradients(gradients(model, x), plain)
    model.set_grad_checkpointing(False)
    assert_near(model(x), y)


def test_backward(family):
    model = create_small(family, num_classes=42).train()
    outputs = as_tuple(model(images()))
    assert all(y.shape == (2, 42) and y.isfinite().all() for y in outputs)
    total(outputs).backward()
    assert_gradients(model)


def test_drop_path_is_active_in_training_only(family):
    def two_passes(model, x):
        torch.manual_seed(1)
        first = total(model(x))
        torch.manual_seed(2)
        return first, total(model(x))

    x = images(4)
    with torch.no_grad():
        still, dropping = (
            create_small(family, drop_path_rate=0.0).train(),
            create_small(family, drop_path_rate=0.5).train(),
        )
        assert torch.equal(*two_passes(still, x))
        assert not torch.equal(*two_passes(dropping, x))
        assert torch.equal(*two_passes(dropping.eval(), x))


def test_frozen_stages(model):
    """Frozen parameters get no gradient, the others do, and frozen BatchNorm keeps its statistics."""
    model.train()
    frozen = [m for m in ("stem", "patch_embed") if hasattr(model, m)] + [model.feature_info[0]["module"]]
    freeze(model, frozen)
    buffers = {n: b.clone() for n, b in model.named_buffers() if n.startswith(tuple(frozen))}
    total(model(images())).backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == name.startswith(tuple(f"{m}." for m in frozen)), name
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers() if n in buffers)


# --- one variant a family: weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", [5, 0])
def test_pretrained_with_another_head_and_one_channel(model, family, num_classes, tmp_path):
    path, state = tmp_path / "weights.pth", model.state_dict()
    torch.save(state, path)
    overlay = {"file": str(path)}
    ours = create_small(
        family, pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1, num_classes=num_classes
    ).eval()
    cfg = model.default_cfg
    first = {f"{layer}.weight" for layer in as_tuple(cfg["first_conv"])}
    heads = tuple(f"{layer}." for layer in as_tuple(cfg["classifier"]))
    for key, value in ours.state_dict().items():
        if key in first:
            torch.testing.assert_close(value, state[key].sum(1, keepdim=True), msg=key)
        elif not key.startswith(heads):
            assert torch.equal(value, state[key]), key
    gray = images(in_chans=1)
    with torch.inference_mode():
        y = ours(gray)
        assert y.shape == (2, num_classes or ours.head_hidden_size)
        model.reset_classifier(0)
        ours.reset_classifier(0)
        assert_near(ours(gray), model(gray.expand(-1, 3, -1, -1)), 1e-2)


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_save_and_load(model, family, kind, tmp_path):
    path, x = tmp_path / f"weights.{kind}", images()
    if kind == "pth":
        torch.save(model.state_dict(), path)
        state = torch.load(path, weights_only=True)
    else:
        safetensors.torch.save_file(model.state_dict(), path)  # refuses tensors that share memory
        state = safetensors.torch.load_file(path)
    plain = create_small(family).eval()
    plain.load_state_dict(state, strict=True)
    loaded = create_small(family, pretrained=True, pretrained_cfg_overlay={"file": str(path)}).eval()
    with torch.inference_mode():
        y = model(x)
        assert torch.equal(plain(x), y)
        assert torch.equal(loaded(x), y)


def test_checkpoint_of_a_run(model, family, tmp_path):
    """What trainers write: the weights under a key, beside other things."""
    x = images()
    for key in ("state_dict", "model"):
        path = tmp_path / f"{key}.pth"
        torch.save({key: model.state_dict(), "epoch": 3}, path)
        loaded = create_small(family, pretrained=True, pretrained_cfg_overlay={"file": str(path)}).eval()
        with torch.inference_mode():
            assert torch.equal(loaded(x), model(x))


def test_init_weights_after_to_empty(family):
    """Built on the meta device, given memory (NaN in these tests), initialised: as good as built in place."""
    model = create_small(family, device="meta").to_empty(device="cpu")
    assert any(p.isnan().any() for p in model.parameters())
    model.init_weights()
    tensors = [*model.named_parameters(), *model.named_buffers()]
    assert [n for n, t in tensors if not t.isfinite().all()] == []
    ordinary = dict(create_small(family).named_parameters())
    for name, p in model.named_parameters():
        expected = ordinary[name]
        if (expected == expected.flatten()[0]).all():
            assert torch.equal(p, expected), name
        elif p.numel() >= 16:
            assert 0.5 < p.std() / expected.std() < 2, f"{name}: spread {p.std()}, not {expected.std()}"
    with torch.inference_mode():
        assert model.eval()(images()).isfinite().all()


def test_copies(model):
    x = images()
    with torch.inference_mode():
        y = model(x)
        assert torch.equal(copy.deepcopy(model)(x), y)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), y)


def test_fuse_for_inference(model):
    """The fused copy computes the same, keeps no BatchNorm behind a convolution, and leaves the model alone."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for norm in [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]:
            for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                tensor.uniform_(0.5, 1.5, generator=generator)
    before, x = copy.deepcopy(model.state_dict()), images()
    with torch.inference_mode():
        y = model(x)
        assert_near(fuse_for_inference(model)(x), y, 1e-4)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert not [n for n, m in fuse_for_inference(model).named_modules() if isinstance(m, nn.BatchNorm2d)]


# --- one variant a family: precision, graphs ------------------------------------------------------------------------


def test_bfloat16(model):
    x = images()
    with torch.inference_mode():
        y = model(x)
        low = model.to(torch.bfloat16)(x.bfloat16())
    assert low.dtype == torch.bfloat16
    assert_close_in_bf16(low, y)


def test_autocast(model):
    x = images()
    with torch.no_grad():
        y = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert_close_in_bf16(model(x), y)
    with torch.autocast("cpu", torch.bfloat16):
        loss = total(model.train()(x))
    loss.backward()
    assert_gradients(model)


@pytest.mark.slow
def test_compile(fewest):
    x = images()
    y, plain = fewest(x), gradients(fewest, x)
    torch.compiler.reset()
    compiled = torch.compile(fewest, fullgraph=True, backend="aot_eager")
    assert_near(compiled(x), y, 1e-4)
    fewest.zero_grad()
    total(compiled(x)).backward()
    assert_same_gradients({n: p.grad for n, p in fewest.named_parameters()}, plain, 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("family", COMPILED_TO_CODE, indirect=True)
def test_compile_inductor(fewest):
    x = images()
    torch.compiler.reset()
    with torch.inference_mode():
        assert_near(torch.compile(fewest, fullgraph=True)(x), fewest(x), 1e-3)


@pytest.mark.slow
def test_export(fewest, family):
    """One exported program serves every batch size and, where the architecture allows, every image size."""
    fixed = get_pretrained_cfg_value(family, "fixed_input_size")
    auto = torch.export.Dim.AUTO
    dims = {0: auto} if fixed else {0: auto, 2: auto, 3: auto}
    size = SIZE if fixed else (128, 192)  # no map of a single row: export takes a 1 for a constant
    program = torch.export.export(fewest, (images(2, size),), dynamic_shapes=(dims,)).module()
    for batch, other in [(2, size), (3, size if fixed else (160, 128))]:
        x = images(batch, other)
        with torch.inference_mode():
            assert_near(program(x), fewest(x), 1e-4)


def test_fx_feature_extraction(model):
    _, nodes = get_graph_node_names(model)
    extractor = GraphExtractNet(model, [nodes[-1]])
    x = images()
    y = model(x)
    assert torch.equal(extractor(x), y)
    total(extractor(x)).backward()
    assert_gradients(extractor)
