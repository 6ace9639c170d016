"""timm's own tests over the zoo's models: `python tests/clients/timm_suite.py [arguments of pytest]`.

The script takes the source distribution of the installed timm from pip, and runs its test files with this module as a
plugin of pytest. The plugin keeps the tests that `MODELS_OF` names and puts our models in the place of timm's. What is
tested is timm's; a failure is ours.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

import platformdirs
import pytest
import timm
import torch

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "backbones"))
from test_contract import representatives  # noqa: E402

FILES = ("test_models", "test_prune", "test_utils")
BACKBONES = [*representatives(), "vmamba_t_v0", "localvim_t_midcls"]
PYRAMIDS = ["vrwkv_t_adapter_seg"]
IMAGES_TO_IMAGES = ["vm_unet", "mhs_vm_unet", "restore_rwkv_light", "fs_rwkv"]
MAPS = [n for n in BACKBONES if getattr(timm.create_model(n, device="meta"), "output_fmt", None) == "NHWC"]
TOKENS = sorted(set(BACKBONES) - set(MAPS))

# {timm's test: the models that it is to hold for}
MODELS_OF = {
    "test_model_forward": BACKBONES + IMAGES_TO_IMAGES,
    "test_model_forward_fx": BACKBONES + IMAGES_TO_IMAGES,
    "test_model_backward": BACKBONES,
    "test_model_backward_fx": BACKBONES,
    "test_model_default_cfgs": MAPS,
    "test_model_default_cfgs_non_std": TOKENS,
    "test_model_load_pretrained": BACKBONES,
    "test_model_features_pretrained": BACKBONES + PYRAMIDS,
    "test_model_forward_features": BACKBONES + PYRAMIDS,
    "test_model_forward_intermediates": BACKBONES,
    "test_model_forward_intermediates_features": BACKBONES,
    "test_reset_classifier_keeps_pool": MAPS,
    "test_head_hidden_size": MAPS,
    "test_features_only_feature_cls_class": BACKBONES,
    "test_prune_intermediate_layers_contract": BACKBONES,
    "test_prune_intermediate_layers_params_used": BACKBONES,
    "test_pruned_feature_info_matches_forward": BACKBONES + PYRAMIDS,
    "test_model_init_weights_after_to_empty": BACKBONES,
    # It looks for `checkpoint_filter_fn` in the model's module: LocalMamba has two, ViM2 none.
    "test_headless_checkpoint_reload": [n for n in BACKBONES if not n.startswith(("local", "vim2"))],
    "test_freeze_unfreeze_root_parameters": BACKBONES,
}
NEED_WEIGHTS = ("test_model_load_pretrained", "test_model_features_pretrained")


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc):
    """Puts our models where a test's marks list timm's; other arguments of the same mark are left empty."""
    models = MODELS_OF.get(metafunc.definition.originalname)
    if models is None:
        return
    for mark in list(metafunc.definition.iter_markers("parametrize")):
        names = [name.strip() for name in mark.args[0].split(",")]
        if "model_name" in names:
            metafunc.definition.own_markers.remove(mark)
            metafunc.parametrize(names, [(model, *({} for _ in names[1:])) for model in models], ids=models)


def pytest_collection_modifyitems(config, items):
    """Leaves out the tests that are not named."""
    config.hook.pytest_deselected(items=[item for item in items if item.originalname not in MODELS_OF])
    items[:] = [item for item in items if item.originalname in MODELS_OF]


@pytest.fixture(autouse=True)
def random_weights(request, monkeypatch, tmp_path):
    """Files of random weights where a test asks for the published ones: nothing is downloaded."""
    torch.manual_seed(0)
    if request.node.originalname in NEED_WEIGHTS:
        create = timm.create_model

        def create_from_file(name, pretrained=False, **kwargs):
            if pretrained:
                torch.save(create(name).state_dict(), tmp_path / "weights.pth")
                overlay = dict(file=str(tmp_path / "weights.pth"), url="", hf_hub_id=None)
                kwargs["pretrained_cfg_overlay"] = overlay
            return create(name, pretrained=pretrained, **kwargs)

        monkeypatch.setattr(request.module, "create_model", create_from_file)


def download() -> Path:
    """The folder with timm's tests, in the user's cache."""
    folder = Path(platformdirs.user_cache_dir("linzoo")) / f"timm-{version('timm')}"
    if not (folder / "tests").is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as made:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
            subprocess.run([*pip, "--dest", made, f"timm=={version('timm')}"], check=True)
            [archive] = Path(made).glob("*.tar.gz")
            with tarfile.open(archive) as file:
                file.extractall(made, filter="data")
            [source] = (path for path in Path(made).iterdir() if path.is_dir())
            source.rename(folder)
    return folder


def main():
    """Runs pytest in timm's folder; its exit status."""
    folder = download()
    python_path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    env = {"OMP_NUM_THREADS": "1", "TIMEOUT": "300", **os.environ, "PYTHONPATH": python_path}
    quiet = ["-q", "--tb=short", "-W", "ignore", "-p", "no:cacheprovider"]
    files = [f"tests/{name}.py" for name in FILES]
    command = [sys.executable, "-m", "pytest", "-p", "timm_suite", *quiet, *files, *sys.argv[1:]]
    return subprocess.run(command, cwd=folder, env=env).returncode


if __name__ == "__main__":
    sys.exit(main())
