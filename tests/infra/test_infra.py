"""Image, Kubernetes manifests, dashboard: linted, valid, of one version, and made of commands that exist."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import typer
import yaml
from packaging.specifiers import SpecifierSet

from cli.main import app
from diffusion.config import load_config
from pipeline.vae.weights import TINY
from tests.support.small_site import BRIEF, Phantoms

IMAGE_EXTRAS = ("dask", "monai", "ray", "report", "s3", "tensorboard", "zarr")
"""What the image holds besides the smallest set."""
INFRA = Path(__file__).resolve().parents[2] / "infra"
BASE = INFRA / "k8s" / "base"
OVERLAYS = ("a100", "s3")
KUBERNETES = "1.31"
RUNBOOK = (INFRA / "docs" / "runbook.md").read_text()

# What KubeRay's own definitions (CRDs) allow; infra/k8s/schemas/kuberay-v1.json says what was left out of them.
KUBERAY = json.loads((INFRA / "k8s" / "schemas" / "kuberay-v1.json").read_text())
MONITOR = {"selector", "podMetricsEndpoints"}
KNOWN_ELSEWHERE = {"RayCluster", "RayJob", "PodMonitor", "Kustomization"}

Document = dict[str, Any]


def documents(folder: Path) -> list[Document]:
    paths = sorted(folder.glob("*.yaml"))
    return [d for path in paths for d in yaml.safe_load_all(path.read_text()) if d is not None]


def apply(document: Document, operation: Document) -> None:
    """One JSON patch operation (RFC 6902: add or replace); a path that is not there is an error, as in kustomize."""
    *parents, last = operation["path"].strip("/").split("/")
    at: Any = document
    for part in parents:
        at = at[int(part)] if isinstance(at, list) else at[part]
    key = int(last) if isinstance(at, list) else last
    if operation["op"] == "replace":
        at[key]  # raises when there is nothing to replace
    else:
        assert operation["op"] == "add"
    at[key] = operation["value"]


def overlaid(name: str) -> list[Document]:
    """The base with an overlay's patches."""
    found = deepcopy(documents(BASE))
    (overlay,) = documents(INFRA / "k8s" / "overlays" / name)
    assert overlay["resources"] == ["../../base"]
    for patch in overlay["patches"]:
        target = patch["target"]
        group = f"{target['group']}/" if "group" in target else ""
        wanted = (f"{group}{target['version']}", target["kind"], target["name"])
        (document,) = [d for d in found if (d["apiVersion"], d["kind"], d.get("metadata", {}).get("name")) == wanted]
        for operation in yaml.safe_load(patch["patch"]):
            apply(document, operation)
    return found


VARIANTS = {"base": documents(BASE), **{name: overlaid(name) for name in OVERLAYS}}


def pods(document: Document) -> Iterator[tuple[str, Document]]:
    """Every pod template of a document, by place."""
    spec = document.get("spec", {})
    if document["kind"] == "Job":
        yield "job", spec["template"]
    if document["kind"] == "RayJob":
        yield "submitter", spec["submitterPodTemplate"]
    cluster = spec.get("rayClusterSpec", spec) if document["kind"] in ("RayCluster", "RayJob") else {}
    if cluster:
        yield "head", cluster["headGroupSpec"]["template"]
        yield from ((group["groupName"], group["template"]) for group in cluster.get("workerGroupSpecs", []))


def every(kind: str | None = None) -> list[Any]:
    return [
        pytest.param(d, id=f"{variant}-{d['kind']}-{d.get('metadata', {}).get('name', '')}")
        for variant, found in VARIANTS.items()
        for d in found
        if kind is None or d["kind"] == kind
    ]


def test_dockerfile_is_clean() -> None:
    linter = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([linter, INFRA / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_image_is_plain_locked_and_without_weights() -> None:
    text = (INFRA / "Dockerfile").read_text()
    final = text.split("\nFROM ")[-1]
    assert re.search(r"^USER 10001$", final, re.MULTILINE)
    assert "--require-hashes" in text
    assert not re.search(r"^(COPY|ADD) .*(weights|\.pt\b|data)", text, re.MULTILINE)


def test_what_the_image_copies_and_starts_exists() -> None:
    text = (INFRA / "Dockerfile").read_text().replace("\\\n", " ")
    root = INFRA.parent
    copied = [
        source for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.MULTILINE) for source in line.split()[:-1]
    ]
    assert copied
    assert all((root / source).exists() for source in copied), copied
    project = tomllib.loads((root / "pyproject.toml").read_text())
    # Every package that the wheel is made of, and the files that its metadata names, are there when it is built.
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {
        *wheel["packages"],
        *wheel["force-include"],
        wheel["hooks"]["custom"]["path"],
        project["project"]["readme"],
    }
    assert needed <= set(copied)
    (entry,) = re.findall(r"^ENTRYPOINT (.+)$", text, re.MULTILINE)
    *_, program = json.loads(entry)
    assert program in project["project"]["scripts"]
    linked = re.search(r"ln -s (.+) /usr/local/bin/", text)
    assert linked is not None
    assert {Path(path).name for path in linked.group(1).split()} == {program, "ray", "python"}
    # The lock was made for the Python that this Ubuntu has.
    assert "ubuntu24.04" in text
    assert "--python-version 3.12" in RUNBOOK
    assert SpecifierSet(project["project"]["requires-python"]).contains("3.12")


def test_lock_pins_everything_by_hash_and_agrees_with_the_constraints() -> None:
    entries = re.split(r"\n(?=\S)", (INFRA / "requirements.lock").read_text().strip())
    pinned = {}
    for entry in entries:
        name, version = entry.split(" ")[0].split("==")
        assert "--hash=sha256:" in entry, name
        pinned[name.split("[")[0]] = version
    assert "torchvision" not in pinned
    root = INFRA.parent
    for line in (root / "constraints.txt").read_text().splitlines():
        if "==" in line:
            name, version = line.split("==")
            assert pinned[name] == version
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(text for extra in IMAGE_EXTRAS for text in extras[extra])]
    needed = [re.split(r"[\[>=]", text)[0] for text in wanted]
    assert len(needed) > 15
    assert not {name.lower() for name in needed} - pinned.keys()
    for document in (*documents(BASE),):
        for spec in (document.get("spec", {}), document.get("spec", {}).get("rayClusterSpec", {})):
            if "rayVersion" in spec:
                assert spec["rayVersion"] == pinned["ray"]


def test_kustomization_names_every_file() -> None:
    (kustomization,) = [d for d in documents(BASE) if d["kind"] == "Kustomization"]
    assert {*kustomization["resources"], "kustomization.yaml"} == {path.name for path in BASE.glob("*.yaml")}
    assert {image["name"] for image in kustomization["images"]} == {"ctpipe"}


@pytest.mark.parametrize("document", [p for p in every() if p.values[0]["kind"] not in KNOWN_ELSEWHERE])
def test_kubernetes_accepts_it(document: Document) -> None:
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


@pytest.mark.parametrize("document", every())
def test_every_pod_is_valid_and_restricted(document: Document) -> None:
    for place, template in pods(document):
        spec = template["spec"]
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "x", **template.get("metadata", {})},
            "spec": spec,
        }
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
        # The namespace enforces Pod Security "restricted": what does not say this never starts.
        assert spec["securityContext"]["runAsNonRoot"] is True, place
        assert spec["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault", place
        mounted = {volume["name"] for volume in spec.get("volumes", [])}
        for container in spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False, place
            assert container["securityContext"]["capabilities"]["drop"] == ["ALL"], place
            assert "memory" in container["resources"]["limits"], place
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= mounted, place
            assert container["image"] == "ctpipe", place
        if place == "gpu":
            assert "private" not in mounted, "workers need no identities"


@pytest.mark.parametrize("document", [*every("RayCluster"), *every("RayJob")])
def test_kuberay_accepts_it(document: Document) -> None:
    assert document["apiVersion"] == "ray.io/v1"
    problems = jsonschema.Draft202012Validator(KUBERAY[document["kind"]]).iter_errors(document)
    assert [f"{list(problem.absolute_path)}: {problem.message}" for problem in problems] == []
    spec = document["spec"].get("rayClusterSpec", document["spec"])
    for group in spec.get("workerGroupSpecs", ()):
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_kuberays_schema_finds_what_is_wrong() -> None:
    (cluster,) = [d for d in VARIANTS["base"] if d["kind"] == "RayCluster"]
    broken = deepcopy(cluster)
    broken["spec"]["workerGroupSpecs"][0]["replica"] = 1
    broken["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0  # KubeRay hands words to `ray start`, no numbers
    found = [e.message for e in jsonschema.Draft202012Validator(KUBERAY["RayCluster"]).iter_errors(broken)]
    assert len(found) == 2


@pytest.mark.parametrize("document", every("PodMonitor"))
def test_prometheus_reads_the_port_that_ray_pods_open(document: Document) -> None:
    assert set(document["spec"]) == MONITOR
    wanted = document["spec"]["selector"]["matchLabels"].items()
    port = document["spec"]["podMetricsEndpoints"][0]["port"]
    for other in VARIANTS["base"]:
        for place, template in pods(other):
            if place in ("head", "gpu"):
                assert wanted <= template["metadata"]["labels"].items()
                assert port in {p["name"] for p in template["spec"]["containers"][0]["ports"]}


def commands() -> Iterator[Any]:
    """Every ctpipe command line of every variant, as words."""
    for variant, found in VARIANTS.items():
        for document in found:
            name = f"{variant}-{document.get('metadata', {}).get('name', '')}"
            if document["kind"] == "RayJob":
                shell, flag, line = shlex.split(document["spec"]["entrypoint"])
                assert (shell, flag) == ("bash", "-c")
                line, _, otherwise = line.partition("||")
                assert otherwise.strip() == "[ $? -eq 3 ]"
                yield pytest.param(shlex.split(line)[1:], id=name)
            if document["kind"] == "Job":
                yield pytest.param(document["spec"]["template"]["spec"]["containers"][0]["args"], id=name)


@pytest.mark.parametrize("words", list(commands()))
def test_commands_and_their_options_exist(words: list[str]) -> None:
    group: Any = typer.main.get_command(app)
    command = group.commands[words[0]]
    with command.make_context(words[0], list(words[1:])) as context:
        assert context.params["store"].endswith("store")


def test_training_has_time_to_leave_a_checkpoint() -> None:
    (job,) = [d for d in VARIANTS["base"] if d["kind"] == "Job"]
    pod = job["spec"]["template"]["spec"]
    patience = load_config("medium")[0].parallel.shutdown_timeout_s
    assert pod["terminationGracePeriodSeconds"] >= patience + 60, "torchrun kills its workers before the pod is killed"
    assert "kill -TERM 1" in pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
    (term,) = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert all("A100" in value and "80GB" in value for value in term["matchExpressions"][0]["values"])


def test_the_image_can_compile() -> None:
    """Triton builds a C module when a compiled model or a fused kernel first runs."""
    final = (INFRA / "Dockerfile").read_text().split("\nFROM ")[-1]
    (installed,) = re.findall(r"apt-get install -y --no-install-recommends (.+?) \\\n", final)
    assert {"gcc", "libc6-dev", "python3-dev"} <= set(installed.split())


@pytest.fixture(scope="module")
def archive(phantoms: Phantoms, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small archive, ingested and encoded as the other jobs would have left it: store, private part and weights."""
    root = tmp_path_factory.mktemp("cluster")
    store, private = root / "store", root / "private"
    for words in (
        ["ingest", phantoms(4, 32, 36), store, "--private", private, "--workers", 1],
        ["encode", store, "--private", private, "--pad-in-plane", 64, "--threads", 1],
    ):
        assert app([str(word) for word in words] + ["--json"], standalone_mode=False) in (0, None, 3)
    (store / "weights").mkdir()
    shutil.copy(TINY, store / "weights" / "autoencoder_epoch273.pt.safetensors")
    return root


SMALL = ["model.width=8", "model.multipliers=[1,2]", "model.attention_levels=[1]", "model.groups=4", "model.heads=2",
         "model.time_embedding=16", "losses.crop=8", "data.readers=0", "optimiser.samples_per_step=2",
         "losses.every=1", "validation.images_every=1", *BRIEF]  # fmt: skip


def test_the_train_job_begins_a_run_and_goes_on_when_its_pod_is_started_again(
    archive: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The job's own command line, on a fresh folder and again, with a small model on the CPU."""
    (job,) = [d for d in VARIANTS["base"] if d["kind"] == "Job"]
    container = job["spec"]["template"]["spec"]["containers"][0]
    mounts = sorted((m["mountPath"] for m in container["volumeMounts"]), key=len, reverse=True)
    words = list(container["args"])
    weights = words[words.index("--vae") + 1]
    words[words.index("--vae") + 1] = weights + ".safetensors"
    words[words.index("--gpus") + 1] = "0"
    for at, word in enumerate(words):
        used = next((m for m in mounts if word == m or word.startswith(m + "/")), None)
        assert used or not word.startswith("/"), f"{word} is on none of the pod's volumes"
        words[at] = str(archive) + word if used else word
    words += [w for setting in SMALL for w in ("--set", setting)]
    steps = []
    for most in (1, 2):
        assert app([*words, "--max-steps", str(most), "--json"], standalone_mode=False) in (0, None)
        summary = json.loads(capsys.readouterr().out.splitlines()[-1])
        steps.append(summary["steps"])
        assert summary["validation"]["val_psnr_db"] > 0, "held-out pixels were read"
    assert steps == [1, 2]
    lines = (archive / "store" / "runs" / "medium" / "log.jsonl").read_text().splitlines()
    trained = [json.loads(line)["step"] for line in lines if json.loads(line)["kind"] == "train"]
    assert trained == [1, 2]


def test_the_train_job_mounts_the_archive_and_the_private_part_to_read() -> None:
    (job,) = [d for d in VARIANTS["base"] if d["kind"] == "Job"]
    mounts = {m["name"]: m for m in job["spec"]["template"]["spec"]["containers"][0]["volumeMounts"]}
    assert mounts["archive"]["readOnly"]
    assert mounts["private"]["readOnly"]


def test_dashboard_shows_what_the_engine_is_called() -> None:
    from pipeline.engines.ray_cluster import Host, _prepare

    board = json.loads((INFRA / "ray" / "grafana-dashboard.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"]) > 4
    assert all("ray_" in query for query in queries)
    assert any(f'Name="{Host.__name__}.run"' in query for query in queries)
    assert any(f'Name="{_prepare.__name__}"' in query for query in queries)


def test_the_runbook_names_what_exists() -> None:
    for path in re.findall(r"`(infra/[\w./-]+)`", RUNBOOK):
        assert (INFRA.parent / path).exists(), path


LINES = re.findall(r"^(?: {4}| {7})(ctpipe .+)$", RUNBOOK, re.MULTILINE)
MENTIONED = re.findall(r"`(ctpipe [a-z][^`]*)`", RUNBOOK)


@pytest.mark.parametrize("line", LINES)
def test_the_runbooks_commands_are_accepted_as_they_stand(line: str) -> None:
    """Parsed by the command line itself: a command, option or argument that is not there is a usage error."""
    words = shlex.split(line)[1:]
    group: Any = typer.main.get_command(app)
    with group.make_context("ctpipe", list(words)) as whole:
        name, command, rest = group.resolve_command(whole, [*whole._protected_args, *whole.args])
        with command.make_context(name, rest, parent=whole):
            pass


@pytest.mark.parametrize("words", MENTIONED)
def test_what_the_runbook_mentions_exists(words: str) -> None:
    _, name, *rest = shlex.split(words)
    group: Any = typer.main.get_command(app)
    options = {option for parameter in group.commands[name].params for option in parameter.opts} | {"--help"}
    assert {word for word in rest if word.startswith("-")} <= options


def test_the_runbook_shows_every_step() -> None:
    assert {line.split()[1] for line in LINES} >= {
        "ingest",
        "encode",
        "train",
        "decode",
        "status",
        "verify",
        "gc",
        "plan",
    }
    assert MENTIONED
