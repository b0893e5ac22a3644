from __future__ import annotations

import json
import math
from pathlib import Path

from diffusion.runs import Journal, read_log


def test_figures_are_lines_and_not_finite_ones_are_null(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write("train", 1, {"loss": 0.5, "mfu": math.nan})
    journal.write("event", 2, {"stopped_by": "signal"})
    journal.close()
    assert read_log(tmp_path / "log.jsonl") == [
        {"kind": "train", "step": 1, "loss": 0.5, "mfu": None},
        {"kind": "event", "step": 2, "stopped_by": "signal"},
    ]


def test_resume_drops_what_came_after_the_checkpoint_and_a_cut_line(tmp_path: Path) -> None:
    lines = [json.dumps({"kind": "train", "step": s}) for s in (1, 2, 3, 4)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + '\n{"kind": "tra')
    journal = Journal(tmp_path, step=2)
    journal.write("train", 3, {"loss": 1.0})
    journal.close()
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [1, 2, 3]


def test_tensorboard_holds_the_same_figures(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    journal = Journal(tmp_path)
    for step in (1, 2, 3):
        journal.write("train", step, {"loss": 1.0 / step, "epoch": 0, "note": "text"})
    journal.close()
    board = EventAccumulator(str(tmp_path / "tb"))
    board.Reload()
    assert [round(e.value, 4) for e in board.Scalars("train/loss")] == [1.0, 0.5, 0.3333]
    assert set(board.Tags()["scalars"]) == {"train/loss", "train/epoch"}
