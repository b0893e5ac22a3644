"""Figures of a run to look at: one JSON object per line in ``log.jsonl``, and the same figures in TensorBoard."""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from latentcache.storage import write_text

log = logging.getLogger("ctpipe.train")
LOG = "log.jsonl"


class Journal:
    """Append-only record of a run. On resume, lines past the checkpoint's step are dropped, so no step appears twice.

    Args:
        run_dir: Folder of the run.
        step: Steps already taken; 0 for a new run.
    """

    def __init__(self, run_dir: Path, step: int = 0) -> None:
        self.path = run_dir / LOG
        if self.path.exists():
            self._keep_until(step)
        self._file: IO[str] = self.path.open("a", encoding="utf-8")
        self._board = _board(run_dir / "tb", step + 1 if step else None)

    def write(self, kind: str, step: int, figures: Mapping[str, Any]) -> None:
        """Record figures at a step; ``kind`` is train, validation, checkpoint or event. NaN becomes null."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in figures.items()}
        self._file.write(json.dumps({"kind": kind, "step": step, **clean}, sort_keys=True, default=str) + "\n")
        self._file.flush()
        for name, value in clean.items():
            if self._board is not None and isinstance(value, (int, float)) and not isinstance(value, bool):
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def _keep_until(self, step: int) -> None:
        kept = [line for line in read_log(self.path) if line["step"] <= step]
        write_text(self.path, "".join(json.dumps(line, sort_keys=True) + "\n" for line in kept))


def _board(folder: Path, purge_step: int | None) -> Any:
    """A TensorBoard writer, or None where TensorBoard is not installed: the journal itself is whole without it."""
    with warnings.catch_warnings():
        # TensorBoard's import chain warns about its own dependencies, which no user can act on.
        warnings.simplefilter("ignore")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] != "tensorboard":
                raise
            log.info("no curves for TensorBoard: pip install 'ctpipe[tensorboard]'; %s has the same figures", LOG)
            return None
        return SummaryWriter(folder, purge_step=purge_step)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a journal; a last line cut by a crash is left out."""
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines
