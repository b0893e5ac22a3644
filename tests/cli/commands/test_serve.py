"""``ctpipe serve`` as an administrator runs it: the real interpolation, in a process of its own, stopped by SIGTERM."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pydicom
import pytest

from cli.main import app
from pipeline.writing import read_provenance
from tests.pipeline.writing.test_ct_image import validator_errors
from tests.support.serve_site import CT, EXPLICIT, free_port
from tests.support.small_site import Site

CONFIG = """
state: {root}/state
model: {root}/run
watch: {{folder: {root}/incoming, every_s: 0.2, settled_s: 0.5}}
rules: [{{name: thick, min_thickness_mm: 3, send_to: [pacs]}}]
destinations: {{pacs: {{c_store: "PACS@127.0.0.1:{port}"}}}}
timing: {{quiet_s: 0.5}}
limits: {{min_free_gib: 0}}
"""


def ctpipe(*words: Any) -> int:
    return int(app([str(word) for word in words], standalone_mode=False) or 0)


def last_json(text: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(text.strip().splitlines()[-1])
    return loaded


def test_a_zip_in_the_watched_folder_becomes_a_thin_series_at_the_pacs(
    trained_site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pynetdicom import AE, evt

    site = trained_site.copy(tmp_path)
    patient, port, got = sorted(site.archive.rglob("*.zip"))[0], free_port(), {}

    def keep(event: Any) -> int:
        got[str(event.request.AffectedSOPInstanceUID)] = event.encoded_dataset()
        return 0

    entity = AE(ae_title="PACS")
    entity.add_supported_context(CT, [EXPLICIT])
    server = entity.start_server(("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_STORE, keep)])
    (tmp_path / "incoming").mkdir()
    conf = tmp_path / "serve.yaml"
    conf.write_text(CONFIG.format(root=tmp_path, port=port))
    assert ctpipe("serve", conf, "--check") == 0
    node = subprocess.Popen([sys.executable, "-m", "cli.main", "serve", str(conf)], stderr=subprocess.PIPE, text=True)
    try:
        shutil.copy(patient, tmp_path / "incoming" / "a.zip")
        for _ in range(300):
            assert node.poll() is None, node.stderr
            capsys.readouterr()
            if (tmp_path / "state" / "private" / "queue.sqlite").exists():
                assert ctpipe("status", conf, "--json") == 0
                if last_json(capsys.readouterr().out)["studies"]["done"] == 1:
                    break
            time.sleep(0.2)
        ctpipe("status", tmp_path / "state")
        text = capsys.readouterr().out
        node.send_signal(signal.SIGTERM)
        _, spoken = node.communicate(timeout=300)
    finally:
        if node.poll() is None:
            node.kill()
            node.communicate()
        server.shutdown()
    assert node.returncode == 0
    assert "1 done" in text
    assert "PHANTOM" not in spoken + text
    assert len(got) % 5 == 0
    assert got
    one = tmp_path / "one.dcm"
    one.write_bytes(next(iter(got.values())))
    assert validator_errors(one) == []
    ds = pydicom.dcmread(one)
    assert read_provenance(ds)["kind"] == "generated"
    assert ds.DeidentificationMethodCodeSequence[0].CodeValue == "113100"
    assert ctpipe("serve", conf, "--retry", "all") == 0
