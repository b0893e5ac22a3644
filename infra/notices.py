"""Third-party notices: name, version, licence and licence texts of everything that ctpipe pulls in here.

    python infra/notices.py --out NOTICES.md              what `pip install ctpipe` brings
    python infra/notices.py --extras all --out NOTICES.md what an image with every extra holds

Made from what is installed, so that it says what is really there: run it in the environment that is shipped. It ends
with an error if a package states no licence at all.
"""

from __future__ import annotations

import argparse
import re
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

NO_LICENCE = "not stated"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extras", default="", help="comma-separated extras of ctpipe; by default none")
    parser.add_argument("--out", type=Path, help="a file; by default stdout")
    options = parser.parse_args()
    found = closure("ctpipe", frozenset(filter(None, options.extras.split(","))))
    text = notices(found)
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    else:
        print(text)
    unknown = [d.name for d in found if licence(d) == NO_LICENCE]
    if unknown:
        sys.exit(f"no licence stated by: {', '.join(unknown)}")


def closure(name: str, extras: frozenset[str]) -> list[Distribution]:
    """Distributions that ``name`` needs, directly or not, as far as they are installed; itself left out."""
    seen: dict[str, Distribution] = {}
    todo, done = [(name, extras)], set()
    while todo:
        wanted, with_extras = todo.pop()
        if (wanted, with_extras) in done:
            continue
        done.add((wanted, with_extras))
        try:
            found = distribution(wanted)
        except PackageNotFoundError:
            continue  # for another platform, or an extra that is not installed
        seen[canonical(wanted)] = found
        for text in found.requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or any(
                requirement.marker.evaluate({"extra": extra}) for extra in (*with_extras, "")
            ):
                todo.append((canonical(requirement.name), frozenset(requirement.extras)))
    seen.pop(canonical(name), None)
    return [seen[key] for key in sorted(seen)]


def canonical(name: str) -> str:
    """A project's name in PEP 503's normal form."""
    return re.sub(r"[-_.]+", "-", name).lower()


def licence(found: Distribution) -> str:
    """Licence as stated: SPDX expression (PEP 639), else classifiers, else the first line of the free text."""
    metadata = found.metadata
    expression = metadata.get("License-Expression")  # type: ignore[attr-defined]
    if expression:
        return str(expression)
    classified = [
        c.split(" :: ")[-1] for c in metadata.get_all("Classifier") or () if c.startswith("License :: OSI Approved ::")
    ]
    if classified:
        return ", ".join(classified)
    free = [line.strip() for line in str(metadata.get("License") or "").splitlines() if line.strip()]  # type: ignore[attr-defined]
    if free:
        return free[0]
    return "see its licence file" if licence_texts(found) else NO_LICENCE


def licence_texts(found: Distribution) -> dict[str, str]:
    """Licence, copying and notice files of a distribution's metadata folder."""
    texts = {}
    for file in found.files or ():
        if ".dist-info" in str(file) and re.match(r"(licen[cs]e|copying|notice|authors)", file.name, re.IGNORECASE):
            path = Path(str(file.locate()))
            if path.is_file():
                texts[str(file).split(".dist-info/", 1)[1]] = path.read_text(encoding="utf-8", errors="replace")
    return texts


def notices(found: list[Distribution]) -> str:
    """Table of all packages, then their licence texts."""
    lines = [
        "# Third-party notices",
        "",
        f"{len(found)} packages.",
        "",
        "| package | version | licence |",
        "|---|---|---|",
    ]
    lines += [f"| {d.name} | {d.version} | {licence(d)} |" for d in found]
    for d in found:
        for name, text in sorted(licence_texts(d).items()):
            lines += ["", f"## {d.name} {d.version}: {name}", "", "```text", text.replace("```", "'''").rstrip(), "```"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
