"""Choice of a study's series to interpolate: the rules of the configuration against what headers say."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.serve.config import ANYONE, RuleConfig


@dataclass(frozen=True)
class SeriesFacts:
    """Facts that rules look at. ``description`` is private and never logged.

    Attributes:
        thickness_mm: SliceThickness; None where the series does not say.
    """

    calling_ae: frozenset[str]
    body_part: str
    description: str
    thickness_mm: float | None
    n_slices: int


def matches(rule: RuleConfig, facts: SeriesFacts) -> bool:
    """Return whether every condition of a rule holds. A condition on what the series does not say does not hold."""
    wanted_ae = {title.strip() for title in rule.calling_ae}
    if wanted_ae and ANYONE not in wanted_ae and not wanted_ae & facts.calling_ae:
        return False
    if rule.body_part and facts.body_part.upper() not in {part.upper() for part in rule.body_part}:
        return False
    if rule.description and not re.search(rule.description, facts.description, re.IGNORECASE):
        return False
    if rule.not_description and re.search(rule.not_description, facts.description, re.IGNORECASE):
        return False
    bounded = (rule.min_thickness_mm, rule.max_thickness_mm) != (0.0, 100.0)
    if bounded and facts.thickness_mm is None:
        return False
    if facts.thickness_mm is not None and not rule.min_thickness_mm <= facts.thickness_mm <= rule.max_thickness_mm:
        return False
    return facts.n_slices >= rule.min_slices


def select(rules: Sequence[RuleConfig], series: Sequence[SeriesFacts]) -> tuple[RuleConfig | None, list[int]]:
    """Return the first rule that selects anything, in the order of the file, and the series that it selects."""
    for rule in rules:
        chosen = [number for number, facts in enumerate(series) if matches(rule, facts)]
        if chosen:
            return rule, chosen
    return None, []
