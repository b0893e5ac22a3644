"""The run's report in a real browser: it works offline, by mouse and by keyboard, on a desk and on a phone."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from pipeline.evaluation import CODE_KNOTS, CODE_KNOTS_HU, CaseView, view_stride
from pipeline.evaluation.case import CaseScores
from pipeline.evaluation.results import summarise, summary_text
from pipeline.evaluation.views import towards
from pipeline.report import write_report
from pipeline.report.images import encode_view
from pipeline.report.tables import spelled
from pipeline.volume import Geometry, Window
from pipeline.workflows.report import lead_paragraph
from tests.support.browser import canvas, chromium, difference, grave_violations, opened

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

SHAPE = (40, 60, 80)


def volume(contrast: float) -> np.ndarray:
    """A body with a bright ball, so that every view looks different."""
    z, y, x = np.indices(SHAPE)
    hu = np.where(((y - 30) / 26) ** 2 + ((x - 40) / 36) ** 2 < 1, 40.0, -1000.0)
    hu[(2 * (z - 14)) ** 2 + (y - 22) ** 2 + (x - 52) ** 2 < 120] = 40 + contrast
    return hu + 3 * np.sin(z)


def document() -> dict[str, Any]:
    def case(key: str, category: str, model: float) -> CaseScores:
        figures = {"nearest": 27.0, "linear": 28.0, "cubic": 29.0, "model": model, "vae_ceiling": 31.0}
        scores: dict[str, dict[str, Any]] = {
            name: {
                "psnr_db": value, "identical": False, "ssim": 0.9, "mae_hu": 4.0, "ms_ssim": {"value": 0.97},
                "bias": {"lung": {"bias_hu": -3.2, "mae_hu": 9.0}, "bone": {"bias_hu": 1.5, "mae_hu": 30.0}},
                "consistency": {"rms_hu": 7.0, "truth_rms_hu": 5.0, "ratio": 1.4},
                "volumetry": {
                    "nodule": {"count": 2.0, "missed": 1.0, "total_error": -0.3, "mean_absolute_error": 0.4},
                    "truth": {"nodule": {"count": 2.0, "missed": 0.0, "total_error": -0.05}},
                },
                "phase": [{"phase": 0.0, "rmse_hu": 5.0, "slices": 8}, {"phase": 0.4, "rmse_hu": 9.0, "slices": 16}],
            }
            for name, value in figures.items()
        }  # fmt: skip
        return CaseScores(key, category, 40, scores, {}, {"rms_hu": 3.2}, key, ())

    cases = [case("aa01", "APE", 30.0), case("aa02", "APE", 30.4), case("bb01", "non-APE", 29.6)]
    bad = CaseScores("bb02", "non-APE", 0, {}, {"case": "7 <non-finite> voxels"}, {}, "bb02", ())
    return {
        **summarise([*cases, bad]),
        "split": "test",
        "test_evaluations": 2,
        "window_hu": [-160.0, 240.0],
        "by_case": [asdict(c) for c in [*cases, bad]],
    }


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    contrasts = {"truth": 200.0, "linear": 90.0, "cubic": 110.0, "model": 170.0}
    view = {**{name: volume(c) for name, c in contrasts.items()}, "uncertainty": np.full(SHAPE, 12.0)}
    view |= {"sample": volume(165.0), "alarm": np.full(SHAPE, 80)}  # in steps of a tenth
    write_report(
        path,
        title="A run <made up>",
        lead=lead_paragraph(document()),
        document=document(),
        window=Window(),
        views=[CaseView("aa01", (1.0, 1.0, 1.0), view, "HPL"), CaseView("aa02", (1.0, 1.0, 1.0), {"truth": volume(50.0),
               "linear": volume(50.0), "model": volume(50.0)})],
        training=[{"step": i, "loss": 1 / (i + 1)} for i in range(10)],
        provenance={"split": "test", "sampling": "</script><b>"},
    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def desk(browser: Browser, page_file: Path) -> tuple[Page, list[str]]:
    return opened(browser, page_file)


def status(page: Page) -> str:
    page.wait_for_function("document.getElementById('status').textContent.length > 0")
    return page.locator("#status").inner_text()


def canvas_sum(page: Page, index: int) -> float:
    return float(canvas(page, f"c{index}").sum())


def test_the_viewer_slider_presets_and_cross_hair_work(desk: tuple[Page, list[str]]) -> None:
    page, complaints = desk
    assert "truth" in status(page)
    first = canvas_sum(page, 0)
    page.locator("#wipe").fill("10")
    wiped = canvas_sum(page, 0)
    assert wiped != first
    page.get_by_role("button", name="Lung").click()
    assert page.get_by_role("button", name="Lung").get_attribute("aria-pressed") == "true"
    assert canvas_sum(page, 0) > wiped, "air is grey in a lung window"
    page.get_by_role("button", name="Run's window").click()
    box = page.locator("#c0").bounding_box()
    assert box is not None
    page.mouse.click(box["x"] + box["width"] * 52.5 / 80, box["y"] + box["height"] * 22.5 / 60)
    assert page.locator("#t1").inner_text() == "Coronal, row 23 of 60"
    assert page.locator("#t2").inner_text() == "Sagittal, column 53 of 80"
    box = page.locator("#c1").bounding_box()
    assert box is not None
    # Rows of the coronal view run upwards: slice 14 of 40 lies at (39 - 14 + 0.5) / 40 from the top.
    page.mouse.click(box["x"] + box["width"] * 52.5 / 80, box["y"] + box["height"] * 25.5 / 40)
    assert page.locator("#t0").inner_text() == "Axial, slice 15 of 40"
    text = status(page)
    assert "truth 2" in text, text
    assert "spread 12 HU" in text
    assert "alarm 8.0" in text
    assert complaints == []


def test_the_keyboard_is_enough(desk: tuple[Page, list[str]]) -> None:
    page, complaints = desk
    page.locator("#c0").focus()
    before = page.locator("#t0").inner_text()
    page.keyboard.press("PageUp")
    assert page.locator("#t0").inner_text() != before
    column = page.locator("#t2").inner_text()
    page.keyboard.press("ArrowRight")
    assert page.locator("#t2").inner_text() != column
    wipe = page.locator("#wipe").input_value()
    page.keyboard.press("]")
    assert float(page.locator("#wipe").input_value()) == float(wipe) + 5
    assert complaints == []


def test_every_mode_paints_something_else_and_says_what(desk: tuple[Page, list[str]]) -> None:
    page, complaints = desk
    sums = []
    modes = {
        "wipe": "Left of the line: Linear",
        "diff": "minus ctpipe model: white is equal",
        "error": "minus the true thin series",
        "spread": "the more orange, the less sure",
        "alarm": "the more orange, the less it may be believed",
    }
    for mode, said in modes.items():
        page.locator("#mode").select_option(mode)
        assert said in page.locator("#legend").inner_text()
        sums.append(canvas_sum(page, 0))
    assert len(set(sums)) == 5
    page.locator("#case").select_option("1")
    page.wait_for_function("document.getElementById('status').textContent.indexOf('spread') < 0")
    assert page.locator("#mode").input_value() == "wipe", "a case without samples has no spread to show"
    page.locator("#case").select_option("0")
    page.wait_for_function("document.getElementById('status').textContent.indexOf('spread') > 0")
    assert complaints == []


def test_edges_are_named_as_a_radiologist_reads_them(desk: tuple[Page, list[str]]) -> None:
    """The drawn letters are taken from the calls, since pixels cannot be read; the second case has no known sides."""
    page, _ = desk
    page.evaluate("""() => {
        const draw = CanvasRenderingContext2D.prototype.fillText;
        window.drawn = [];
        CanvasRenderingContext2D.prototype.fillText = function (text, x, y) {
            window.drawn.push([this.canvas.id, text, Math.round(2 * x / this.canvas.width),
                               Math.round(2 * y / this.canvas.height)]);
            draw.call(this, text, x, y);
        };
        render();
    }""")
    places = {(name, x, y): text for name, text, x, y in page.evaluate("window.drawn")}
    left, right, top, bottom = (0, 1), (2, 1), (1, 0), (1, 2)
    for view, edges in (("c0", "RLAP"), ("c1", "RLHF"), ("c2", "APHF")):
        assert "".join(places[view, *at] for at in (left, right, top, bottom)) == edges
    page.locator("#case").select_option("1")
    page.wait_for_function("document.getElementById('status').textContent.indexOf('spread') < 0")
    page.evaluate("window.drawn = []; render()")
    assert page.evaluate("window.drawn") == []
    page.locator("#case").select_option("0")
    page.wait_for_function("document.getElementById('status').textContent.indexOf('spread') > 0")


@pytest.mark.parametrize(
    ("columns", "letters"),
    [(((0, 0, 1), (0, 1, 0), (1, 0, 0)), "HPL"), (((0, 0, -1), (0, -0.9, 0.3), (-1, 0, 0)), "FAR")],
)
def test_sides_follow_from_the_affine(columns: tuple[tuple[float, ...], ...], letters: str) -> None:
    affine = np.eye(4)
    affine[:3, :3] = np.array(columns).T
    assert towards(Geometry((2, 2, 2), tuple(tuple(row) for row in affine.tolist()), (0.0, 1.0), 1.0)) == letters


def test_axe_finds_no_serious_violation(desk: tuple[Page, list[str]]) -> None:
    page, _ = desk
    assert grave_violations(page) == []


def test_a_phone_shows_it_without_sideways_scrolling(browser: Browser, page_file: Path, repo_root: Path) -> None:
    page, complaints = opened(browser, page_file, 390, 844)
    status(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert grave_violations(page) == [], "charts and tables that scroll in themselves can be reached by keyboard"
    assert complaints == []
    assert difference(page.locator(".planes").screenshot(), repo_root / "tests" / "golden" / "report_phone.png") < 12


def test_the_page_looks_as_it_did(desk: tuple[Page, list[str]], repo_root: Path) -> None:
    page, _ = desk
    page.reload()
    status(page)
    assert difference(page.locator("#viewer").screenshot(), repo_root / "tests" / "golden" / "report_viewer.png") < 12


def test_the_text_is_plain_escaped_and_complete(page_file: Path) -> None:
    text = page_file.read_text(encoding="utf-8")
    assert "A run &lt;made up&gt;" in text
    assert "&lt;/script&gt;&lt;b&gt;" in text
    assert "7 &lt;non-finite&gt; voxels" in text
    assert "http:" not in text.replace("http://www.w3.org", "")
    assert "https:" not in text
    assert "{{" not in text


def test_the_first_paragraph_is_honest_about_losses() -> None:
    good = document()
    assert "1.00 dB more than cubic" in lead_paragraph(good)
    assert "off by 4.0 HU on average, one of cubic interpolation of the thick slices by 4.0 HU" in lead_paragraph(good)
    assert "fine detail" not in lead_paragraph(good), "nothing was measured of it"
    good["methods"]["cubic_consistent"] = {**good["methods"]["cubic"], "psnr_db": 29.75}
    assert "agreement alone brings cubic interpolation to 29.75 dB: the network itself adds 0.25 dB" in lead_paragraph(
        good
    )
    good["methods"]["cubic_consistent"]["psnr_db"] = 30.5
    assert "30.50 dB: the network adds nothing" in lead_paragraph(good)
    good["methods"]["model"]["detail_explained"] = 0.351
    good["methods"]["cubic"]["detail_explained"] = -0.2
    assert "it gets 35% right (cubic interpolation 0%); the rest is missing or made up" in lead_paragraph(good)
    good["methods"]["model"]["detail_explained"] = -0.1
    assert "None of the fine detail that it adds between the thick slices is true" in lead_paragraph(good)
    good["methods"]["model"]["psnr_db"] = 20.0
    assert "do not use this model" in lead_paragraph(good)
    good["methods"]["model"]["psnr_db"] = None
    assert "could not be compared" in lead_paragraph(good)


def test_figures_on_simulated_thick_slices_say_so_before_anything_else() -> None:
    made = document() | {"simulated_pairs": 2}
    assert lead_paragraph(made).startswith("Simulated: every thick series here was computed from its thin one")
    assert summary_text(made, Path("x")).startswith("Simulated: ")
    for real in (document(), document() | {"simulated_pairs": 0}):
        assert lead_paragraph(real).startswith("On ")
        assert "imulated" not in summary_text(real, Path("x"))


def test_the_first_paragraph_says_what_split_it_speaks_of() -> None:
    found = document()
    text = lead_paragraph(found)
    assert "4 pairs of 4 patients of the test split" in text
    assert "evaluated 2 times" in text
    found["split"] = "train"
    assert "The model has seen these patients" in lead_paragraph(found)
    found["split"] = "val"
    assert "a little too good" in lead_paragraph(found)
    assert "held-out" not in lead_paragraph(found)
    found["methods"]["regression"] = {**found["methods"]["model"], "psnr_db": 35.0}
    assert "less than a small network trained for as long" in lead_paragraph(found)
    assert "the small network is better" in lead_paragraph(found)


def test_what_physicists_and_radiologists_measure_has_its_tables(page_file: Path) -> None:
    text = page_file.read_text(encoding="utf-8")
    assert "lung, bias" in text
    assert "fat, bias" not in text, "nothing was measured there"
    assert "RMS(Ax-y) (HU)" in text
    assert "nodules in the true thin series measure -5%" in text
    assert "1.0 of 2.0" in text
    assert "Lung density" not in text
    assert "<th scope=col>APE (2 pairs)</th><th scope=col>non-APE (2 pairs)</th>" in text


def test_a_page_stays_under_15_mb_at_full_size(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shape = (300, 100, 100)
    assert view_stride((300, 512, 512)) == 6
    noisy = rng.normal(40, 60, shape).astype(np.float32)
    names = ("truth", "nearest", "linear", "cubic", "model", "vae_ceiling")
    views = [CaseView(f"c{i}", (1.0, 4.0, 4.0), dict.fromkeys(names, noisy)) for i in range(3)]
    path = tmp_path / "big.html"
    write_report(path, title="t", lead="l", document=document(), window=Window(), views=views)
    assert path.stat().st_size < 15_000_000
    text = path.read_text(encoding="utf-8")
    assert text.count("data:image/jpeg") == 18, "all three cases stay, at less quality"


def test_small_volumes_are_kept_without_loss(page_file: Path) -> None:
    text = page_file.read_text(encoding="utf-8")
    assert "data:image/jpeg" not in text
    case = encode_view(CaseView("k", (1.0, 1.0, 1.0), {"truth": volume(200.0)}), quality=None)
    coded = case["volumes"][0]["src"].split(",")[1]
    with Image.open(io.BytesIO(base64.b64decode(coded))) as image:
        sheet = np.asarray(image)
    middle = np.interp(sheet[60:120, :80].astype(float), CODE_KNOTS, CODE_KNOTS_HU)  # slice 7 of rows of 7
    inside = volume(200.0)[7] > -240
    assert np.abs(middle - volume(200.0)[7])[inside].max() < 2, "the coding adds nothing to the companding"


def test_a_spread_of_nothing_is_said_to_tell_nothing() -> None:
    still = {"truth": volume(10), "uncertainty": np.zeros(SHAPE)}
    assert encode_view(CaseView("k", (1.0, 1.0, 1.0), still))["flat"] is True
    assert encode_view(CaseView("k", (1.0, 1.0, 1.0), {**still, "uncertainty": np.ones(SHAPE)}))["flat"] is False


def test_settings_are_spelled_for_people() -> None:
    facts = {"detail": "residual", "consistency": True, "refiner_sha256": "", "sampling": {"steps": None, "seed": 0}}
    assert spelled(facts) == "detail residual, consistency yes, sampling (seed 0)"


def test_companding_keeps_soft_tissue_within_3_hu() -> None:
    hu = np.linspace(-240, 340, 1000)
    codes = np.rint(np.interp(hu, CODE_KNOTS_HU, CODE_KNOTS))
    assert np.abs(np.interp(codes, CODE_KNOTS, CODE_KNOTS_HU) - hu).max() < 2
    case = encode_view(CaseView("k", (2.0, 1.0, 1.0), {"truth": volume(10)}))
    assert case["shape"] == list(SHAPE)
    assert case["spacing"] == [2.0, 1.0, 1.0]
