"""The configuration and the rules: strict, with errors that name the way out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from latentcache import InputError
from pipeline.serve import read_config
from pipeline.serve.config import RuleConfig
from pipeline.serve.rules import SeriesFacts, matches, select

GOOD = """
state: /var/lib/ctpipe
listen: {ae_title: CTPIPE, port: 11112}
peers: [{ae_title: CT1, host: 10.0.0.5}, {ae_title: ORTHANC}]
rules:
  - name: chest
    calling_ae: CT1
    body_part: [CHEST, LUNG]
    min_thickness_mm: 3
    send_to: [pacs]
destinations:
  pacs: {c_store: "PACS@10.0.0.6:104"}
timing: {quiet_s: 90}
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    return path


def test_a_configuration_is_read_with_defaults(tmp_path: Path) -> None:
    config = read_config(written(tmp_path, GOOD))
    assert config.listen is not None
    assert (config.listen.port, config.timing.quiet_s, config.timing.attempts) == (11112, 90.0, 3)
    assert config.rules[0].calling_ae == ("CT1",)
    assert config.peers[1].host == ""


def test_the_documented_example_is_sound(repo_root: Path, tmp_path: Path) -> None:
    text = (repo_root / "infra" / "docs" / "serve.md").read_text()
    example = text.split("```yaml\n")[1].split("```")[0]
    config = read_config(written(tmp_path, example))
    assert config.rules
    assert config.destinations


@pytest.mark.parametrize(
    ("old", "new", "found", "remedy"),
    [
        ("timing: {quiet_s: 90}", "timing: {quite_s: 90}", "unknown key timing.quite_s", "timing.quiet_s"),
        ("body_part:", "bodypart:", "unknown key rules[0].bodypart", "rules[0].body_part"),
        ("port: 11112", "port: eleven", "listen.port is 'eleven'", "Correct it"),
        ("send_to: [pacs]", "send_to: [pcas]", "rules[0].send_to names pcas", "Declare it"),
        ("peers: [{ae_title: CT1, host: 10.0.0.5}, {ae_title: ORTHANC}]", "", "listen without peers", "anyone"),
        ("name: chest", "name: a b/c", "rules[0].name", "logs"),
        ("min_thickness_mm: 3", "description: '('", "rules[0].description", "Escape"),
        ("state: /var/lib/ctpipe", "", "no state", "example"),
        ("quiet_s: 90", "attempts: 0", "attempts = 0", "Correct it"),
        ("quiet_s: 90", "quiet_s: .inf", "timing.quiet_s is inf", "Correct it"),
        ("ae_title: CTPIPE", "ae_title: MUCH_TOO_LONG_A_TITLE", "listen.ae_title", "administrator"),
        ("rules:", "rules: [", "no plain YAML", "indentation"),
        ('c_store: "PACS@10.0.0.6:104"', "calling_ae: X", "destinations.pacs", "Leave one"),
    ],
)
def test_what_is_wrong_is_named_with_its_remedy(tmp_path: Path, old: str, new: str, found: str, remedy: str) -> None:
    assert old in GOOD
    with pytest.raises(InputError) as caught:
        read_config(written(tmp_path, GOOD.replace(old, new)))
    assert found in caught.value.found
    assert remedy in caught.value.remedy


def test_a_bomb_is_refused_before_anything_walks_through_it(tmp_path: Path) -> None:
    """Ten lines that stand for 9^10 values, and a file that takes seconds to parse."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    with pytest.raises(InputError, match="stands for more than"):
        read_config(written(tmp_path, "\n".join(lines)))
    with pytest.raises(InputError, match="KiB"):
        read_config(written(tmp_path, "# x\n" * 100_000))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_config(tmp_path / "none.yaml")


FACTS = SeriesFacts(frozenset({"CT1"}), "CHEST", "Thorax 5.0 B30f", 5.0, 50)


@pytest.mark.parametrize(
    ("changes", "holds"),
    [
        ({}, True),
        ({"calling_ae": ("CT1",)}, True),
        ({"calling_ae": ("CT2",)}, False),
        ({"calling_ae": ("*",)}, True),
        ({"body_part": ("chest",)}, True),
        ({"body_part": ("HEAD",)}, False),
        ({"description": r"thorax.*b\d\df"}, True),
        ({"description": "^B30f"}, False),
        ({"not_description": "b30"}, False),
        ({"min_thickness_mm": 5.0}, True),
        ({"min_thickness_mm": 5.1}, False),
        ({"max_thickness_mm": 4.9}, False),
        ({"min_slices": 51}, False),
    ],
)
def test_every_condition_counts(changes: dict[str, object], holds: bool) -> None:
    assert matches(replace(RuleConfig("r", ("pacs",)), **changes), FACTS) is holds  # type: ignore[arg-type]


def test_a_bound_on_what_the_series_does_not_say_does_not_hold() -> None:
    silent = replace(FACTS, thickness_mm=None)
    assert matches(RuleConfig("r", ("pacs",)), silent)
    assert not matches(RuleConfig("r", ("pacs",), min_thickness_mm=1.0), silent)


def test_the_first_rule_that_selects_anything_wins() -> None:
    head, any_ = RuleConfig("head", ("a",), body_part=("HEAD",)), RuleConfig("any", ("b",))
    assert select([head, any_], [FACTS, FACTS]) == (any_, [0, 1])
    assert select([head], [FACTS]) == (None, [])
