"""Build hook: a CycloneDX bill of materials goes into the wheel (PEP 770, ``.dist-info/sboms/``).

A wheel carries no code but its own, so the bill lists what it is made of besides code (model weights, by SHA-256) and
what it asks a resolver for, required or behind an extra. Nothing in it depends on when or where it was made: the same
tree gives the same bytes. What one machine has installed is another question: `infra/notices.py` answers it.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
import uuid
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "ctpipe.sbom")
WEIGHTS = ("*.safetensors", "*.pt")


class SbomHook(BuildHookInterface):  # type: ignore[type-arg]
    """Writes the bill before the wheel is made and hands its path to hatchling."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add ``ctpipe.cdx.json`` to the wheel; other targets and editable installs get none."""
        if self.target_name != "wheel" or version == "editable":
            return
        core = self.metadata.core
        self._folder = tempfile.TemporaryDirectory(prefix="ctpipe-sbom-")
        path = Path(self._folder.name, "ctpipe.cdx.json")
        document = sbom(
            Path(self.root),
            self.build_config.packages,
            name=core.name,
            version=self.metadata.version,
            required=core.dependencies,
            optional=core.optional_dependencies,
        )
        path.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        build_data["sbom_files"].append(str(path))

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the temporary file."""
        folder = getattr(self, "_folder", None)
        if folder is not None:
            folder.cleanup()


def sbom(
    root: Path,
    packages: list[str],
    *,
    name: str,
    version: str,
    required: list[str],
    optional: dict[str, list[str]],
) -> dict[str, Any]:
    """Return the bill as CycloneDX 1.6: weights with their checksums, declared dependencies with their ranges."""
    own = f"pkg:pypi/{name}@{version}"
    weights = sorted(p for package in packages for form in WEIGHTS for p in (root / package).rglob(form))
    components = [_weights(path, root) for path in weights]
    libraries = {lib["bom-ref"]: lib for lib in _libraries(required, optional, name)}
    components += [libraries[ref] for ref in sorted(libraries)]
    content = json.dumps([own, components], sort_keys=True)
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(NAMESPACE, content)}",
        "version": 1,
        "metadata": {
            "component": {
                "type": "application",
                "bom-ref": own,
                "name": name,
                "version": version,
                "purl": own,
                "licenses": [{"license": {"id": "Apache-2.0"}}],
            }
        },
        "components": components,
        "dependencies": [
            {"ref": own, "dependsOn": sorted(c["bom-ref"] for c in components)},
            *({"ref": c["bom-ref"]} for c in components),
        ],
    }


def _weights(path: Path, root: Path) -> dict[str, Any]:
    relative = path.relative_to(root).as_posix()
    return {
        "type": "machine-learning-model",
        "bom-ref": f"file:{relative}",
        "name": relative,
        "hashes": [{"alg": "SHA-256", "content": hashlib.sha256(path.read_bytes()).hexdigest()}],
    }


def _libraries(required: list[str], optional: dict[str, list[str]], own: str) -> list[dict[str, Any]]:
    """Declared dependencies; one that is required stays so whatever extra names it again."""
    extras: dict[str, set[str]] = {}
    ranges: dict[str, str] = {}
    groups = {extra: texts for extra, texts in optional.items() if extra != "dev"} | {"": required}
    for extra, texts in sorted(groups.items(), reverse=True):
        for text in sorted(texts):
            match = re.match(r"([A-Za-z0-9._-]+)(\[[^\]]*\])?\s*([^;]*)", text)
            assert match is not None, text
            name = re.sub(r"[-_.]+", "-", match[1]).lower()
            if name != own:
                ranges[name] = match[3].strip() or "*"
                extras.setdefault(name, set()).add(extra)
    found = []
    for name, wanted in extras.items():
        properties = [{"name": "ctpipe:requirement", "value": ranges[name]}]
        properties += [{"name": "ctpipe:extra", "value": extra} for extra in sorted(wanted) if extra]
        purl = f"pkg:pypi/{name}"
        scope = "required" if "" in wanted else "optional"
        about = {"type": "library", "bom-ref": purl, "name": name, "purl": purl, "scope": scope}
        found.append({**about, "properties": properties})
    return found
