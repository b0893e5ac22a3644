"""What an ingest found, for people and machines. Names things by key only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

SHOWN = 40
"""Lines of a list that people get; machines get all."""


@dataclass(frozen=True)
class SetAside:
    """Something that should have been usable and is not."""

    kind: str
    key: str
    reason: str


@dataclass(frozen=True)
class IngestSummary:
    """Counts over the whole store after an ingest, and what is set aside.

    ``archives`` counts by outcome of this run: new, changed, unchanged, ignored (folders without DICOM), excluded.
    """

    dry_run: bool = False
    archives: dict[str, int] = field(default_factory=dict)
    patients: int = 0
    studies: int = 0
    series: dict[str, int] = field(default_factory=dict)
    pairs: int = 0
    splits: dict[str, int] = field(default_factory=dict)
    paired_splits: dict[str, int] = field(default_factory=dict)
    categories: dict[str, int] = field(default_factory=dict)
    set_aside: Sequence[SetAside] = ()

    @property
    def quarantined(self) -> bool:
        """Whether the run ends with exit code 3."""
        return bool(self.set_aside)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "set_aside": [asdict(item) for item in self.set_aside]}

    def text(self) -> str:
        """A table for people."""

        def counts(values: dict[str, int]) -> str:
            return ", ".join(f"{n} {name}" for name, n in values.items()) or "none"

        lines = [
            ("archives", counts(self.archives)),
            ("patients", f"{self.patients} ({counts(self.categories)})"),
            ("studies", str(self.studies)),
            ("series", counts(self.series)),
            ("pairs", str(self.pairs)),
            ("splits", f"{counts(self.splits)} patients; with a pair: {counts(self.paired_splits)}"),
            ("set aside", str(len(self.set_aside))),
        ]
        if self.dry_run:
            lines = [lines[0], ("dry run", "nothing was read or written")]
        width = max(len(name) for name, _ in lines)
        out = [f"{name:<{width}}  {value}" for name, value in lines]
        out += [f"  {item.kind} {item.key}: {item.reason}" for item in self.set_aside[:SHOWN]]
        if len(self.set_aside) > SHOWN:
            out.append(f"  and {len(self.set_aside) - SHOWN} more; --json lists all")
        return "\n".join(out)
