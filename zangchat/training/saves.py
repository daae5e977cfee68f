"""When a run saves, and the one save that may be under way while training continues."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zangchat import checkpoint_manager
from zangchat.checkpoint_files import Save
from zangchat.errors import UserError
from zangchat.runtime import collectives
from zangchat.runtime.files import file_sha256
from zangchat.training.flags import RunConfig
from zangchat.training.metrics import MetricsFile

SAVE_SECONDS = 600.0  # --save_every=-1

logger = logging.getLogger(__name__)


class SaveSchedule:
    """Checkpoints of a run in `directory` (None: it saves nothing), as --save_every, --keep_last
    and --keep_every ask.

    A save in the middle of a run copies the tensors, and a thread writes them. The step exists from
    the first boundary at which all ranks have written (`finish`); until then its meta may change.
    """

    def __init__(
        self,
        directory: str | Path | None,
        config: RunConfig | None = None,
        resume_command: str = "the same command with --resume=latest",
    ) -> None:
        self.directory = None if directory is None else Path(directory)
        self.config, self.resume_command = config or RunConfig(), resume_command
        self.rank, self.world_size = collectives.world()
        path = None
        if self.directory is not None and self.rank == 0:
            path = self.directory / "metrics.jsonl"
        self.metrics = MetricsFile(path)
        self.last_step = -1  # the newest step that was saved, or is being written
        self.requested = False  # by the clock of rank 0, agreed on by all ranks
        self.tokenizer_sha256: str | None = None
        self._last_time = time.monotonic()
        self._pending: Save | None = None

    def prepare(self, step: int, tokenizer: Any = None) -> None:
        """Prepare the folder for a run at `step`: delete later steps, add the tokenizer. All ranks
        call it.

        Raises ValueError if a new run would mix with the steps of another.
        """
        self.last_step, self._last_time = step or -1, time.monotonic()
        if self.directory is None:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        if self.rank == 0:
            if (
                step == 0
                and not self.config.overwrite
                and list(checkpoint_manager.steps(self.directory))
            ):
                raise ValueError(
                    f"{self.directory} holds the checkpoints of another run; overwrite=True "
                    "deletes them",
                )
            checkpoint_manager.remove_temporary_files(self.directory)
            deleted = checkpoint_manager.discard_after(self.directory, step or -1)
            if deleted:
                logger.info(
                    f"deleted step {', '.join(map(str, deleted))} from {self.directory}: this run "
                    f"computes them again from step {step}",
                )
            path = self.directory / "tokenizer.json"
            if tokenizer is not None and (step == 0 or not path.exists()):
                tokenizer.save(self.directory)
            self.tokenizer_sha256 = file_sha256(path) if path.exists() else None
        collectives.barrier()

    # ---- when ------------------------------------------------------------------------------------

    def is_due(self, step: int, last: bool) -> bool:
        every = self.config.save_every
        if self.directory is None or step in (0, self.last_step):
            return False
        return last or (step % every == 0 if every > 0 else every < 0 and self.requested)

    @property
    def clock_is_due(self) -> bool:
        return time.monotonic() - self._last_time >= SAVE_SECONDS

    @property
    def is_writing(self) -> bool:
        return self._pending is not None and self._pending.is_writing

    # ---- how -------------------------------------------------------------------------------------

    def begin(self, step: int, model_data: Any, optimizer_data: Any, meta: Any, last: bool) -> None:
        """Every rank calls this, after `finish`. The last save of a run is finished at once."""
        assert self.directory is not None and self._pending is None
        self._pending = Save(
            self.directory,
            step,
            model_data,
            optimizer_data,
            meta,
            self.rank,
            snapshot=not last,
        )
        self.last_step, self._last_time, self.requested = step, time.monotonic(), False
        if last:
            self.finish(last)

    def finish(self, last: bool = False) -> None:
        """Wait for the save under way and make its step exist. If it could not be written, the
        previous step stays and training continues; raises UserError if there is no training
        left."""
        save, self._pending = self._pending, None
        if save is None:
            return
        self.metrics.flush()  # a step that exists has its metrics
        problem = f"could not save step {save.step} to {save.directory}"
        try:
            save.commit()
        except OSError as error:
            if last:
                remedy = f"make room, then continue with `{self.resume_command}`"
                raise UserError(f"{problem} ({error}): {remedy}") from error
            logger.warning(
                f"{problem} ({error}): training continues, the previous save stays, and the next "
                "one comes at its time",
            )
            return
        if self.rank == 0:
            config = self.config
            checkpoint_manager.purge(save.directory, config.keep_last, config.keep_every)
            logger.info(f"saved step {save.step} to {save.directory}")

    def update_meta(self, step: int, make_meta: Callable[[], dict[str, Any]]) -> None:
        """Add the results of the hooks to the checkpoint of `step`, if that was saved before
        them.
        """
        if self.last_step != step or self.directory is None:
            return
        if self._pending is not None:
            self._pending.meta_data = make_meta()
        elif self.rank == 0:
            try:
                checkpoint_manager.update_meta(self.directory, step, make_meta())
            except OSError as error:
                logger.warning(
                    f"could not update the meta of step {step} ({error}): resuming evaluates that "
                    "step again",
                )
