"""The report in a real browser: Chromium without a window, and without a network."""

import re
import shutil

import numpy as np
import pytest

from protoclf import ProtoPNetClassifier
from protoclf.report import write_report

pytest.importorskip("jinja2", reason="the report is a Jinja2 template")
driver = pytest.importorskip("playwright.sync_api", reason="Playwright, the driver, is missing")

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")

FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)
SCRIPT = "<script>alert(1)</script>"
NAMES = {
    "blue": SCRIPT,
    "green": "초록 새",
    "red": "a-name-without-a-space-that-is-far-too-long-for-it",
}
TOP = 2


@pytest.fixture(scope="module")
def explained(squares, tmp_path_factory):
    """A report on twelve images, two of them wrong at least, and its sheets."""
    X, y = squares
    y = np.array([NAMES[label] for label in y])
    clf = ProtoPNetClassifier(
        *("small_cnn",),
        image_size=48,
        prototypes_per_class=3,
        joint_epochs=0,
        lambda_l1=1e-4,
        random_state=0,
        verbose=0,
    ).fit(X, y)
    predicted = clf.predict(X[:12])
    y = predicted.copy()
    y[:2] = np.where(predicted[:2] == SCRIPT, NAMES["red"], SCRIPT)
    path = tmp_path_factory.mktemp("report") / "the report.html"
    how = {"top": TOP, "attribution": "gradient"}  # boxes in training images of each line's own
    write_report(clf, X[:12], y, path, **how)
    return path, clf.explain(X[:12], "top2", **how), y


@pytest.fixture(scope="module")
def browser():
    with driver.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, explained):
    """Open the report in a window of some width; fail on any error in it or request by it."""
    contexts, troubles = [], []

    def open_page(width=1300, **options):
        context = browser.new_context(viewport={"width": width, "height": 800}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("dialog", lambda dialog: (troubles.append("a dialog"), dialog.dismiss()))
        page.on(
            "request", lambda request: troubles.append(request.url) if outside(request) else None
        )
        page.goto(explained[0].as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert troubles == []


def outside(request):
    return not request.url.startswith(("file:", "data:"))


def rectangles(card, *selectors):
    """Return x0, y0, x1, y1 in the window of several elements of a card, at one moment."""
    found = card.evaluate(
        """(card, selectors) => selectors.map((selector) => {
            const box = card.querySelector(selector).getBoundingClientRect();
            return [box.left, box.top, box.right, box.bottom];
        })""",
        selectors,
    )
    return np.array(found)


def in_window(box, picture):
    """Map a box in an original of 60 x 40 pixels to the window."""
    scale = (picture[2:] - picture[:2]) / [60, 40]
    assert scale[0] == pytest.approx(scale[1], rel=0.02)
    return (picture[:2] + np.reshape(box, (2, 2)) * scale).ravel()


@pytest.mark.parametrize("width", [1300, 360])
def test_boxes_are_at_their_pixels(width, open_page, explained):
    page = open_page(width)
    sheet = explained[1].dropna(subset="prototype")
    for row in sheet[sheet["sample"].isin([0, 5])].itertuples():
        card = page.locator(f"#image-{row.sample}")
        mark = mark_of(row)
        card.locator(f"tr[data-mark='{mark}'] a").focus()  # a rival's box is seen while lit
        picture, frame, drawn, source, source_drawn = rectangles(
            card,
            *("image", ".scene svg", f"g[data-mark='{mark}'] .line"),
            *(".source svg", ".source .line"),
        )
        np.testing.assert_allclose(picture, frame, atol=1)
        box = (row.x0, row.y0, row.x1, row.y1)
        np.testing.assert_allclose(drawn, in_window(box, picture), atol=1)
        box = (row.source_x0, row.source_y0, row.source_x1, row.source_y1)
        np.testing.assert_allclose(source_drawn, in_window(box, source), atol=1)


def mark_of(row):
    return f"{'' if row.is_predicted else 'R'}{row.rank}"


def test_the_parts_in_a_line_are_the_boxes_cut_out(open_page, explained):
    page = open_page()
    row = explained[1].iloc[0]
    crop = page.locator(f"#image-{row['sample']} tr[data-mark='1'] .crop").first
    x0, y0, x1, y1 = row[["x0", "y0", "x1", "y1"]]
    assert crop.get_attribute("viewBox") == f"{x0} {y0} {x1 - x0} {y1 - y0}"
    card = page.locator(f"#image-{row['sample']}")
    (left, top, right, bottom), *_ = rectangles(card, "tr[data-mark='1'] .crop")
    assert (right - left) / (bottom - top) == pytest.approx((x1 - x0) / (y1 - y0), rel=0.02)
    assert max(right - left, bottom - top) == pytest.approx(72, abs=1)


def test_tab_reaches_every_line_and_lights_its_box_and_its_source(open_page, explained):
    page = open_page()
    card = page.locator("#image-3")
    card.locator("tr[data-mark] a").first.focus()
    rows = explained[1][explained[1]["sample"] == 3].dropna(subset="prototype")
    assert len(rows) == card.locator("tr[data-mark]").count()
    for row in rows.itertuples():
        mark = mark_of(row)
        lit = card.locator("[data-mark].lit")
        assert set(lit.evaluate_all("all => all.map(e => e.dataset.mark)")) == {mark}
        assert set(lit.evaluate_all("all => all.map(e => e.localName)")) == {"tr", "g", "span"}
        assert card.locator("g.lit .line").first.is_visible()
        likeness = card.locator(".source .likeness").inner_text()
        assert likeness == ("is unlike" if row.similarity < 0 else "looks like")
        name = card.locator(".source .name").inner_text()
        assert name == f"prototype {int(row.prototype)}, {row.prototype_class}"
        assert f"training image {row.source}" in card.locator(".source .file").inner_text()
        page.keyboard.press("Tab")


def test_a_line_reached_on_a_narrow_screen_is_not_behind_the_pictures(open_page):
    page = open_page(360)
    links, pictures = page.locator("#image-0 .of a"), page.locator("#image-0 .pictures")
    links.last.focus()
    for _ in range(links.count()):
        top = page.evaluate("document.activeElement.closest('tr').getBoundingClientRect().top")
        bottom = pictures.evaluate("e => e.getBoundingClientRect().bottom")
        assert top >= bottom - 1
        page.keyboard.press("Shift+Tab")


def test_pointing_at_a_line_lights_it(open_page):
    page = open_page()
    card = page.locator(".card").nth(2)
    card.locator("tr[data-mark='R1'] td").first.hover()
    assert card.locator("g.rival.lit .line").is_visible()
    card.locator("tr[data-mark='1'] td").first.hover()
    assert not card.locator("g[data-mark='R1'] .line").is_visible()
    yellow = card.locator("g[data-mark='1'] .line").evaluate("e => getComputedStyle(e).stroke")
    assert yellow == "rgb(255, 221, 0)"


def test_the_lit_line_and_the_bars_show_in_forced_colours(open_page):
    page = open_page(forced_colors="active")
    colours = page.locator("#image-0 .predicted").evaluate(
        """sheet => ["tr.lit td", "tr:not(.lit) td", ".bar", ".lit .mark"].map(
            (selector) => getComputedStyle(sheet.querySelector(selector)).background)"""
    )
    assert len(set(colours)) == 4


def test_filters_hide_and_show_and_say_how_many(open_page, explained):
    page = open_page()
    _, sheet, y = explained
    predicted = sheet[sheet["is_predicted"]].groupby("sample")["class"].first().to_numpy()
    right = predicted == y
    shown, verdict = page.locator(".filters output"), page.get_by_label("Prediction")
    assert shown.inner_text() == "All 12 images"
    verdict.select_option("wrong")
    assert visible_cards(page) == set(np.flatnonzero(~right))
    assert shown.inner_text() == "2 of 12 images"
    verdict.select_option("right")
    of_class = page.locator("select[name=label]")
    of_class.select_option(index=1)
    label = of_class.locator("option").nth(1).inner_text().rpartition(" (")[0]
    chosen = right & (predicted == label)
    assert chosen.any()
    assert visible_cards(page) == set(np.flatnonzero(chosen))
    verdict.select_option("")
    assert visible_cards(page) == set(np.flatnonzero((predicted == label) | (y == label)))


def test_a_choice_that_the_browser_restores_is_heeded(open_page):
    """On the way back: after the report's script and before ``pageshow``.

    The choice is restored here in the browser's stead, that keeps it only where it had the time.
    """
    page = open_page()
    page.add_init_script(
        """addEventListener("load", () => {
            document.querySelector("select[name=verdict]").value = "wrong";
        })"""
    )
    page.reload()
    assert page.locator(".card:visible").count() == 2
    assert page.locator(".filters output").inner_text() == "2 of 12 images"


def visible_cards(page):
    cards = page.locator(".card:visible").evaluate_all("all => all.map(e => e.id)")
    return {int(card.removeprefix("image-")) for card in cards}


def test_a_link_to_a_prototype_leads_there(open_page):
    page = open_page()
    page.locator(".gallery").evaluate("e => { e.open = false }")
    link = page.locator("#image-4 tr[data-mark='1'] a")
    link.focus()
    page.keyboard.press("Enter")
    tile = page.locator(link.get_attribute("href"))
    assert tile.is_visible()
    assert tile.evaluate("e => e.getBoundingClientRect().top") < 800


def test_names_are_text(open_page):
    page = open_page()
    assert page.locator("script").count() == 1
    assert page.get_by_role("heading", name=SCRIPT).count() > 0
    assert page.locator("option", has_text=SCRIPT).count() == 1


def test_a_class_written_from_right_to_left_leaves_what_follows_in_its_place(open_page):
    card = open_page().locator(".card.wrong").first
    right, left = card.evaluate(
        """card => {
            const label = card.querySelector("header b");
            label.textContent = "ציפור 3";
            const after = document.createRange();
            after.selectNodeContents(label.nextSibling);
            return [label.getBoundingClientRect().right, after.getBoundingClientRect().left];
        }"""
    )
    assert left >= right - 1


def test_it_makes_sense_without_its_script(open_page, explained):
    page = open_page(java_script_enabled=False)
    assert page.locator(".card:visible").count() == 12
    assert not page.locator(".filters").is_visible()
    assert page.locator("#image-0 g.lit .line").first.is_visible()
    assert page.locator("#image-0 .source .scene").is_visible()


@pytest.mark.parametrize("width", [360, pytest.param(800, marks=pytest.mark.slow), 1300])
def test_nothing_is_wider_than_the_window(width, open_page):
    page = open_page(width)
    for card in page.locator(".card").all():
        card.scroll_into_view_if_needed()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    wide = page.locator("main *:visible").evaluate_all(
        "(all, width) => all.filter(e => e.getBoundingClientRect().right > width + 1"
        " && !e.closest('svg')).map(e => e.outerHTML.slice(0, 80))",
        width,
    )
    assert wide == []


def test_everything_is_printed(open_page):
    page = open_page(color_scheme="dark")
    page.emulate_media(media="print")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == "rgb(255, 255, 255)"
    assert not page.locator(".filters").is_visible()
    pages = page.pdf()
    assert len(re.findall(rb"/Type\s*/Page\b", pages)) >= 6


@pytest.mark.parametrize(
    ("scheme", "width"), [("light", 1300), pytest.param("dark", 360, marks=pytest.mark.slow)]
)
def test_axe_finds_nothing_serious(scheme, width, open_page):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is missing")
    page = open_page(width, color_scheme=scheme)
    page.add_style_tag(content=".card, .class { content-visibility: visible !important }")
    found = axe.Axe().run(page).response["violations"]
    serious = {
        rule["id"]: [node["html"][:120] for node in rule["nodes"][:3]]
        for rule in found
        if rule["impact"] in ("serious", "critical")
    }
    assert serious == {}
