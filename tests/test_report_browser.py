"""The page of runs in a real browser, Chromium without a window; names of classes and runs are no harmless words."""

import itertools
import json
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from toy_command import run
from toy_runs import CLASSES, write_log, write_scores

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium drives the browser: pip install selenium")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import Select, WebDriverWait  # noqa: E402

RUNS = ("plain", "<b>böld & 5 $")
WIDTH, NARROW = 1280, 390


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.skip("no Chromium here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The runs' scores by name, and the page's address as "page"."""
    folder = tmp_path_factory.mktemp("runs")
    found: dict[str, Any] = {}
    for seed, name in enumerate(RUNS):
        write_log(folder / name, seed=seed)
        found[name] = write_scores(folder / name, seed)
    result = run("report", *(folder / name for name in RUNS))
    assert result.exit_code == 0, result.output
    return {**found, "page": (folder / "report.html").as_uri()}


@pytest.fixture
def page(browser: Any, scores: dict[str, Any]) -> Any:
    show(browser, scores["page"])
    return browser


def show(browser: Any, address: str, width: int = WIDTH, dark: bool = False, media: str = "") -> None:
    """Open the page and wait for its charts."""
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": [scheme]})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width == NARROW}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(address)
    WebDriverWait(browser, 20).until(lambda _: browser.execute_script("return document.documentElement.dataset.drawn"))


def texts(browser: Any, selector: str) -> list[str]:
    script = "return [...document.querySelectorAll(arguments[0])].map(place => place.textContent.trim())"
    return browser.execute_script(script, selector)


def style(browser: Any, selector: str, name: str) -> str:
    script = "return getComputedStyle(document.querySelector(arguments[0])).getPropertyValue(arguments[1])"
    return browser.execute_script(script, selector, name)


def test_it_loads_without_errors_and_asks_for_nothing(browser: Any, scores: dict[str, Any]) -> None:
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    show(browser, scores["page"])
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert [address for address in asked if not address.startswith("data:")] == [scores["page"]]
    plots = browser.execute_script("return [...document.querySelectorAll('.plot')].map(p => !!p.querySelector('svg'))")
    assert len(plots) == 10
    assert all(plots)
    broken = "return [...document.images].filter(image => !image.naturalWidth).length"
    assert len(browser.find_elements(By.TAG_NAME, "img")) == 24
    assert browser.execute_script(broken) == 0


def test_names_are_text(page: Any) -> None:
    assert page.title == f"{', '.join(RUNS)}: report"
    assert texts(page, "h1") == [", ".join(RUNS)]
    assert texts(page, "#class-scores tbody th") == CLASSES
    assert page.execute_script("return document.querySelectorAll('main b, main i, main script').length") == 0
    axis = texts(page, "#chart-confusion-0 .role-axis-label text")
    assert [name for name in CLASSES if axis.count(name) == 2] == [name for name in CLASSES if len(name) < 20]
    assert 'photos/"best" <b>.jpg' in texts(page, ".compare h4")[0]


def test_numbers_are_those_of_the_file(page: Any, scores: dict[str, Any]) -> None:
    rows = {}
    for row in page.execute_script(
        "return [...document.querySelectorAll('#scores tbody tr')].map(r => [...r.children].map(c => c.textContent))"
    ):
        rows[row[0].strip()] = row[1:]
    of_runs = [scores[name] for name in RUNS]
    for title, key in (("mIoU", "miou"), ("mAcc", "macc"), ("allAcc", "allacc"), ("fwIoU", "fwiou")):
        assert rows[title] == [f"{each[key]:.4f}" for each in of_runs]
    assert rows["calibration error (ECE)"] == ["0.0321"] * 2
    assert rows["interval of mIoU"] == ["0.6100 to 0.8200 (95%)"] * 2
    cells = texts(page, "#class-scores tbody td")
    shown = [
        "-" if (value := each[key][name]) is None else f"{value:.4f}"
        for name in CLASSES
        for each in of_runs
        for key in ("iou", "accuracy", "dice")
    ]
    assert cells == shown


def test_a_cell_of_the_confusion_matrix_tells_its_counts(page: Any, scores: dict[str, Any]) -> None:
    counts = scores[RUNS[1]]["confusion"]
    cell = page.find_element(By.CSS_SELECTOR, "#chart-confusion-1 .mark-rect path")  # sky called sky
    assert counts[0][0] >= 1000
    webdriver.ActionChains(page).scroll_to_element(cell).move_to_element(cell).perform()
    WebDriverWait(page, 5).until(lambda _: texts(page, "#vg-tooltip-element td.value"))
    assert texts(page, "#vg-tooltip-element td.value") == [
        CLASSES[0],
        CLASSES[0],
        f"{counts[0][0] / sum(counts[0]):.2%}",
        f"{counts[0][0]:,}",
    ]
    bars = "return [...document.querySelectorAll('#chart-iou .mark-rect path')].map(bar => bar.ariaLabel)"
    told = {tuple(part.split(": ", 1)[1] for part in label.split("; ")) for label in page.execute_script(bars)}
    known = {(name, run): iou for run in RUNS for name, iou in scores[run]["iou"].items() if iou is not None}
    assert {(name, run): float(iou) for iou, name, run in told} == pytest.approx(known)


def test_the_slider_moves_the_cut(page: Any) -> None:
    entry = page.find_element(By.CSS_SELECTOR, ".compare")
    slider = entry.find_element(By.CSS_SELECTOR, "input[type=range]")
    clips = [style(page, ".compare .right", "clip-path")]
    for key in (Keys.HOME, Keys.ARROW_RIGHT, Keys.END):
        slider.send_keys(key)
        clips.append(style(page, ".compare .right", "clip-path"))
    assert clips == [f"inset(0px 0px 0px {place}%)" for place in (50, 0, 1, 100)]
    stack = entry.find_element(By.CSS_SELECTOR, ".stack")
    webdriver.ActionChains(page).move_to_element(stack).click_and_hold().release().perform()
    assert slider.get_attribute("value") == "50"
    shown = "return [...arguments[0].querySelectorAll('figure')].filter(f => f.checkVisibility()).map(f => f.innerText)"
    assert page.execute_script(shown, entry) == ["image", "prediction"]
    for side, layer in (("left", "truth"), ("right", "error")):
        Select(entry.find_element(By.CSS_SELECTOR, f"[data-side={side}]")).select_by_value(layer)
    assert page.execute_script(shown, entry) == ["truth", "errors"]


def test_light_and_dark(page: Any, scores: dict[str, Any]) -> None:
    light, dark = "rgb(255, 255, 255)", "rgb(20, 24, 29)"
    assert style(page, "body", "background-color") == light
    label = style(page, ".role-axis-label text", "fill")
    page.find_element(By.ID, "theme").click()
    assert style(page, "body", "background-color") == dark
    assert style(page, ".role-axis-label text", "fill") != label
    page.find_element(By.ID, "theme").click()
    assert style(page, "body", "background-color") == light
    show(page, scores["page"], dark=True)
    assert style(page, "body", "background-color") == dark
    page.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert style(page, "body", "background-color") == light


def test_phones_paper_and_screen_readers(browser: Any, scores: dict[str, Any]) -> None:
    show(browser, scores["page"], NARROW)
    assert browser.execute_script("return document.documentElement.scrollWidth") == NARROW
    show(browser, scores["page"], media="print")
    assert browser.execute_script(
        "return [...document.querySelectorAll('.stack figure')].every(f => f.checkVisibility())"
    )
    assert style(browser, "nav", "display") == "none"
    images = browser.execute_script("return [...document.images].map(image => image.alt)")
    assert len(set(images)) == len(images) == 24
    levels = browser.execute_script("return [...document.querySelectorAll('h1,h2,h3,h4')].map(h => +h.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(below - above <= 1 for above, below in itertools.pairwise(levels))
