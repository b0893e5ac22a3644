"""Text that people read at the end of a command, made from the result that programs get as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.encode import EncodeSummary
    from pipeline.workflows import EncodeJob

DEMO_METHODS = ("nearest", "linear", "cubic", "cubic_consistent", "refined", "model", "vae_ceiling")
"""Rows of the demo's table, worst first."""


def encode_text(summary: EncodeSummary, job: EncodeJob) -> str:
    """Summary of an encode run: what was encoded, what is out of date or damaged, what was excluded."""
    verb = "would encode" if job.dry_run else "encoded"
    lines = [
        f"{verb} {summary.planned} studies or series "
        f"({summary.committed} latents committed, {summary.already} already there)",
        f"encode key {summary.encode_key}, snapshot {summary.snapshot}",
    ]
    lines += [f"mirrored along {axis}: encode key {key}" for axis, key in sorted(summary.mirrored.items())]
    if summary.retired:
        lines.append(f"{summary.retired} latents of archives that had changed were retired")
    if summary.stale:
        verb = "would be retired and made anew" if job.refresh else "give --refresh to make them anew"
        lines.append(f"{summary.stale} latents are of archives that have changed since, or of another refiner: {verb}")
    if job.repair:
        verb = "to be made anew" if job.dry_run else "retired to be made anew"
        again = f"{summary.restored} came back byte for byte, in older snapshots too"
        lines.append(
            f"{summary.damaged} latents are damaged or gone, {summary.damaged - len(summary.hopeless)} {verb}"
            + ("" if job.dry_run else f"; {again}")
        )
    lines += [f"cannot be repaired {name}: {reason}" for name, reason in sorted(summary.hopeless.items())]
    lines += [
        f"run {name} is pinned to a snapshot with {count} of them: begin it anew or restore them from a copy"
        for name, count in sorted(summary.pinned.items())
    ]
    lines += [f"set aside {name}: {reason}" for name, reason in sorted(summary.failed.items())]
    lines += [f"pair refused {name}: {reason}" for name, reason in sorted(summary.unpaired_by_pixels.items())]
    return "\n".join(lines)


def verify_text(facts: dict[str, Any]) -> str:
    """Problems found, one per line, and what was read."""
    problems = facts["problems"]
    lines = [f"{p['store']}{' ' if p['store'] else ''}{p['subject']}: {p['what']}" for p in problems]
    lines.append(
        f"{facts['latents']} latents, {facts['fragments']} fragments and {facts['snapshots']} snapshots read "
        f"({facts['bytes'] / 1e9:.2f} GB): {len(problems) or 'no'} problem{'s' if len(problems) != 1 else ''}; "
        f"{facts['orphans']} attempts without a row, which `ctpipe gc` takes after a day"
    )
    return "\n".join([*lines, *(sources_text(facts) if "compared" in facts else [])])


def sources_text(found: dict[str, Any]) -> list[str]:
    """Return latents of another series, what was not compared, and what to do."""
    lines = [
        f"{name}: holds another series than its archive (they differ by {by:.2f} of the standard deviation)"
        for name, by in sorted(found["foreign"].items())
    ]
    lines += [f"{name}: not compared: {why}" for name, why in sorted(found["unread"].items())]
    lines += [
        f"{count} latents of encoding {key} not compared: another VAE made them, give it with --vae"
        for key, count in sorted(found["skipped"].items())
    ]
    if found["retired"]:
        pairs = f", {found['pairs_reopened']} pairs to be proved anew" if found["pairs_reopened"] else ""
        lines.append(
            f"{found['retired']} latents retired{pairs}: `ctpipe encode` makes them from what the archive holds"
        )
    elif found["foreign"]:
        lines.append("give --retire to take them out, then run `ctpipe encode`")
    return [
        *lines,
        f"{found['compared']} latents made again from their archives: {len(found['foreign'])} of another series",
    ]


def demo_text(result: dict[str, Any], out: Path) -> str:
    """Return the table of methods, gains, time and where the results are."""
    psnr, ssim = result["psnr_db"], result["ssim"]
    lines = [f"PSNR in the window (dB) and SSIM, mean over {result['held_out_pairs']} held-out patients:"]
    lines += [f"  {name:16s} {psnr[name]:.2f}  {ssim[name]:.4f}" for name in DEMO_METHODS]
    lines.append(
        f"  model against cubic made consistent, which no learning takes: {result['gain_over_consistent_db']:+.2f} dB, "
        f"SSIM {result['gain_over_consistent_ssim']:+.4f}; against plain cubic {result['gain_over_cubic_db']:+.2f} dB"
    )
    lines.append(f"{result['seconds']['total']:.0f} s, peak {result['peak_rss_gib']} GiB")
    lines.append(f"without training: open {next((out / 'at-once').glob('*.html'), out / 'at-once')}")
    lines.append(f"open {out / 'report.html'}; thin-slice DICOM is in {out / 'dicom'}")
    return "\n".join(lines)


def spell_seconds(seconds: float) -> str:
    """``40 s``, ``12 min`` or ``2.5 h``."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def interpolate_text(result: dict[str, Any], out: Path) -> str:
    """Return slices, folder, model, residuals, certificates and warnings of a series."""
    text = (
        f"{result['source_slices']} slices -> {result['slices']} at {result['spacing_mm']:g} mm "
        f"in {out / result['key']} ({result['seconds']:.1f} s)"
    )
    if result.get("model"):
        text += f"\nmodel {result['model']}"
    if result.get("profile"):
        text += f"; slice profile assumed: {result['profile']}"
    if result.get("rms_after_hu") is not None:
        text += f"\nRMS against the measured slices {result['rms_before_hu']:.1f} -> {result['rms_after_hu']:.1f} HU"
    for name in ("certificate", "sample_certificate"):
        if said := result.get(name, {}).get("said"):
            text += f"\n{'of the sample: ' if name != 'certificate' else ''}{said}"
    if result.get("page"):
        text += f"\nopen {result['page']}"
    return text + "".join(f"\nwarning: {one}" for one in result["warnings"])


def train_text(figures: dict[str, Any], run: Path) -> str:
    """Return steps, time, loss, validation and how to go on."""
    lines = [
        f"{figures['steps']} steps in {figures['seconds']:.0f} s (stopped by: {figures['stopped_by']}), "
        f"loss {figures['loss']:.4f}, data wait {figures['data_wait_fraction']:.1%}",
    ]
    if figures["validation"]:
        lines.append("validation: " + ", ".join(f"{k} {v:.4f}" for k, v in sorted(figures["validation"].items())))
    lines.append(f"checkpoints in {run}/checkpoints; continue with --resume")
    return "\n".join(lines)
