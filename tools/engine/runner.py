"""mmengine's runner, hardened: whole checkpoints only, exact resumption, CPU processes."""

import logging
import os
import shutil
from pathlib import Path

import torch
from mmengine.dist import barrier, is_main_process
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner as MMRunner
from torch.distributed import init_process_group

from linzoo.backbones.openmmlab import LinZooBackbone

from .weights import check_fit, check_parts, read_checkpoint


def write_atomically(path: str | os.PathLike, write) -> None:
    """Call `write(partial)` on a temporary name in the same folder, then move it to `path`: whole or not there."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    with open(partial, "rb+") as f:
        os.fsync(f.fileno())
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def latest_checkpoint(work_dir: str | os.PathLike) -> Path | None:
    """The checkpoint to resume from, or None where this run has written none.

    `last_checkpoint` names it. Its folder is ignored, since a work dir may have been moved; where the name is torn (the
    pointer is not written atomically), the newest checkpoint stands in: checkpoints themselves are whole.
    """
    pointer = Path(work_dir, "last_checkpoint")
    if not pointer.exists():
        return None
    named = pointer.with_name(Path(pointer.read_text().strip() or "torn").name)
    if named.is_file():
        return named
    found = (path for kind in ("epoch", "iter") for path in pointer.parent.glob(f"{kind}_*.pth"))
    return max(found, key=lambda p: p.stat().st_mtime, default=None)


class Runner(MMRunner):
    """mmengine's Runner with atomic checkpoints, exact resumption and CPU processes."""

    def setup_env(self, env_cfg: dict) -> None:
        """As mmengine's, with gloo instead of nccl where there is no CUDA (mmengine then asks CUDA for a device)."""
        if self.distributed and not torch.cuda.is_available() and not torch.distributed.is_initialized():
            init_process_group("gloo")
        super().setup_env(env_cfg)

    def build_logger(self, *args, **kwargs):
        """As mmengine's; its long dumps and deprecation notes go to the log file only."""
        logger = super().build_logger(*args, **kwargs)
        for handler in logger.handlers:
            if type(handler) is logging.StreamHandler:
                handler.addFilter(_short)
        return logger

    def wrap_model(self, model_wrapper_cfg, model):
        """As mmengine's; on CPU DistributedDataParallel takes no device ids, and BatchNorms are not synchronised."""
        if not torch.cuda.is_available():
            self.cfg.sync_bn = None
        if self.distributed and not torch.cuda.is_available():
            model_wrapper_cfg = dict(model_wrapper_cfg or {}, device_ids=None)
            model_wrapper_cfg.setdefault("broadcast_buffers", False)
        return super().wrap_model(model_wrapper_cfg, model)

    @staticmethod
    def build_dataloader(dataloader, seed=None, diff_rank_seed=False):
        """As mmengine's, with workers that torch seeds anew each epoch.

        mmengine's own `worker_init_fn` gives every epoch the same augmentations; a persistent worker carries a random
        state that no checkpoint holds.
        """
        if isinstance(dataloader, dict):
            dataloader = dict(dataloader, persistent_workers=False)
            dataloader.setdefault("worker_init_fn", {"type": _leave_as_seeded})
        return MMRunner.build_dataloader(dataloader, seed, diff_rank_seed)

    def load_or_resume(self) -> None:
        """As mmengine's, from the last whole checkpoint.

        Partial files are removed, and a new run forgets the pointer to an earlier run's checkpoint.
        """
        if self._resume and self._load_from is None:
            found = latest_checkpoint(self.work_dir)
            if found is None:
                self.logger.info(f"No checkpoint in {self.work_dir} to resume from: training starts from scratch.")
            else:
                self.resume(str(found))
            self._has_loaded = True
        barrier()
        if is_main_process() and self._train_loop is not None:
            for partial in Path(self.work_dir).glob(".*.partial"):
                shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
            if not self._resume:
                Path(self.work_dir, "last_checkpoint").unlink(missing_ok=True)
        super().load_or_resume()

    def resume(self, filename, *args, **kwargs) -> None:
        """As mmengine's, refusing another model's checkpoint; the sampler follows the resumed seed as well."""
        trained = self.model.module if is_model_wrapper(self.model) else self.model
        if isinstance(getattr(trained, "backbone", None), LinZooBackbone):
            check_parts(trained, read_checkpoint(filename)[0], filename)
        elif hasattr(trained, "model"):  # ours, around a timm model
            check_fit(trained.model, read_checkpoint(filename)[0], filename)
        super().resume(filename, *args, **kwargs)
        self.train_dataloader.sampler.seed = self.seed

    def save_checkpoint(self, out_dir, filename, *args, **kwargs) -> None:
        """As mmengine's, but the file appears whole or not at all."""
        if is_main_process():
            save = super().save_checkpoint
            write_atomically(Path(out_dir, filename), lambda partial: save(out_dir, partial.name, *args, **kwargs))


def _short(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return "\n" not in message and "deprecated in future" not in message


def _leave_as_seeded(worker_id: int) -> None:
    pass
