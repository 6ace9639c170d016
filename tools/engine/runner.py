"""mmengine's runner, hardened: only complete checkpoints, exact resumption, CPU processes."""

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import barrier, is_main_process
from mmengine.logging import MMLogger
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner as MMRunner
from torch import nn
from torch.distributed import init_process_group
from torch.utils.data import DataLoader

from .data import first_line
from .errors import InputError
from .files import write_atomically
from .resume import latest_checkpoint
from .task import Task
from .weights import fit, load_start, load_weights, read_checkpoint


class Runner(MMRunner):
    """mmengine's Runner with atomic checkpoints, exact resumption and CPU processes."""

    def setup_env(self, env_cfg: dict) -> None:
        """As mmengine's, with gloo instead of nccl if there is no CUDA (mmengine then asks CUDA for a device)."""
        if self.distributed and not torch.cuda.is_available() and not torch.distributed.is_initialized():
            init_process_group("gloo")
        super().setup_env(env_cfg)

    def build_logger(self, *args, **kwargs) -> MMLogger:
        """As mmengine's; its long dumps and deprecation notes go to the log file only."""
        logger = super().build_logger(*args, **kwargs)
        for handler in logger.handlers:
            if type(handler) is logging.StreamHandler:
                handler.addFilter(_short)
        return logger

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> Any:
        """As mmengine's; on CPU, DistributedDataParallel takes no device ids and BatchNorms are not synchronised."""
        if not torch.cuda.is_available():
            self.cfg.sync_bn = None
        if self.distributed and not torch.cuda.is_available():
            model_wrapper_cfg = dict(model_wrapper_cfg or {}, device_ids=None)
            model_wrapper_cfg.setdefault("broadcast_buffers", False)
        return super().wrap_model(model_wrapper_cfg, model)

    @staticmethod
    def build_dataloader(dataloader: Any, seed: int | None = None, diff_rank_seed: bool = False) -> DataLoader:
        """As mmengine's, with workers that torch seeds anew each epoch.

        mmengine's own `worker_init_fn` gives every epoch the same augmentations. A persistent worker has a random state
        that no checkpoint stores.
        """
        if isinstance(dataloader, dict):
            dataloader = dict(dataloader, persistent_workers=False)
            dataloader.setdefault("worker_init_fn", {"type": _leave_as_seeded})
            dataset = dataloader["dataset"]
            if isinstance(dataset, dict) and str(dataset.get("type")).rpartition(".")[2] == "TimmShards":
                sizes = dict(batch_size=dataloader["batch_size"], num_workers=dataloader.get("num_workers", 0))
                dataloader.update(sampler=None, dataset=dict(dataset, **sizes))  # a stream has its own order
        return MMRunner.build_dataloader(dataloader, seed, diff_rank_seed)

    def load_or_resume(self) -> None:
        """Resumes the work dir's run from its last complete checkpoint, if any; otherwise starts from `load_from`.

        Partial files are removed, and a new run removes the pointer to an earlier run's checkpoint.
        """
        found = latest_checkpoint(self.work_dir) if self._resume else None
        barrier()
        if is_main_process() and self._train_loop is not None:
            for partial in Path(self.work_dir).glob(".*.partial"):
                shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
            if not self._resume:
                Path(self.work_dir, "last_checkpoint").unlink(missing_ok=True)
        if self._has_loaded:
            return
        if found is not None:
            self.resume(str(found))
        elif self._load_from is not None:
            (load_weights if self._train_loop is None else load_start)(self.weights, self._load_from)
            self.call_hook("after_load_checkpoint", checkpoint={"state_dict": self.trained.state_dict()})
            self.logger.info(f"Training starts from {self._load_from}.")
        elif self._resume:
            self.logger.info(f"No checkpoint in {self.work_dir} to resume from: training starts from scratch.")
        self._has_loaded = True

    @property
    def trained(self) -> nn.Module:
        """The model without the wrapper of distributed training."""
        return getattr(self.model, "module") if is_model_wrapper(self.model) else self.model  # noqa: B009

    @property
    def weights(self) -> nn.Module:
        """The module whose state dict checkpoints store."""
        return self.trained.weights() if isinstance(self.trained, Task) else self.trained

    def resume(self, filename: str, *args, **kwargs) -> None:
        """As mmengine's, but refuses another model's checkpoint; the sampler also uses the resumed seed."""
        state, classes = read_checkpoint(filename)
        fit(self.weights, state, filename)
        ours = getattr(self.train_dataloader.dataset, "metainfo", {}).get("classes")
        if classes and ours and classes != list(ours):
            raise InputError(f"--resume: the classes are {list(ours)} and were {classes} when {filename!r} was written")
        try:
            super().resume(filename, *args, **kwargs)
        except (IndexError, KeyError, TypeError, ValueError) as e:
            raise InputError(f"--resume: the config does not go on from {filename!r}: {first_line(e)}") from e
        self.train_dataloader.sampler.seed = self.seed

    def save_checkpoint(self, out_dir: str, filename: str, *args, **kwargs) -> None:
        """As mmengine's, but writes the file completely or not at all; InputError says where --resume continues."""
        if not is_main_process():
            return
        save = super().save_checkpoint
        try:
            write_atomically(Path(out_dir, filename), lambda partial: save(out_dir, partial.name, *args, **kwargs))
        except InputError as e:
            kept = latest_checkpoint(self.work_dir)
            raise InputError(f"{e}; " + (f"--resume goes on from {kept}" if kept else "no checkpoint is there")) from e


def _short(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return "\n" not in message and "deprecated in future" not in message


def _leave_as_seeded(worker_id: int) -> None:
    pass
