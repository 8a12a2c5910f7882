"""The docs site: built without a network or a warning, complete, seen in a browser."""

import functools
import http.server
import importlib
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
import soundfile
from conftest import RATE, keep_screenshot, violations, voice
from markdown_it import MarkdownIt
from mdit_py_plugins.amsmath import amsmath_plugin
from mdit_py_plugins.dollarmath import dollarmath_plugin

import cpc_nb
from cpc_nb.config import Config, make_config
from cpc_nb.report import plot_frames, plot_speakers, report

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(  # as the sidebar has them: the story, how to, and the others
    (
        path.name
        for path in (ROOT / "nbs").glob("*.ipynb")
        if path.name != "index.ipynb"
    ),
    key=lambda name: (name[0] != "0", name[0] != "7", name),
)
PAGES = [
    "index.html",
    *(
        re.sub(r"^\d+[a-zA-Z0-9]*_", "", Path(name).stem) + ".html"
        for name in NOTEBOOKS
    ),
]
PAGE_OF_MODULE = {  # a page of results exports no module
    module: page
    for name, page in zip(NOTEBOOKS, PAGES[1:])
    for module in re.findall(
        r"#\| default_exp (\w+)", (ROOT / "nbs" / name).read_text()
    )
}
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "IN_TEST"}


class Page(HTMLParser):
    """The identifiers, the links, the images and what else is loaded of a page."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.sources, self.images = set(), [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if attributes.get("id"):
            self.ids.add(attributes["id"])
        if tag == "a" and attributes.get("href"):
            self.links.append(attributes["href"])
        if tag == "img":
            self.images.append(attributes)
        if attributes.get("src"):
            self.sources.append(attributes["src"])
        if tag == "link" and attributes.get("href"):
            self.sources.append(attributes["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The website; `CPC_NB_SITE` names the folder of one that is built."""
    if built := os.environ.get("CPC_NB_SITE"):
        return Path(built)
    folder = tmp_path_factory.mktemp("docs") / "site"
    built = subprocess.run(
        [sys.executable, "nbs/_sphinx/build.py", folder],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0 and built.stderr == "", built.stdout + built.stderr
    return folder


@pytest.fixture(scope="module")
def parsed(site):
    return {
        path.relative_to(site).as_posix(): Page(path) for path in site.rglob("*.html")
    }


def test_one_page_a_notebook_in_order(site, parsed):
    assert set(PAGES) <= set(parsed)
    for page in PAGES:
        sidebar = re.findall(
            r'<li class="toctree-l1[^"]*"><a class="[^"]*" href="([^"]*)"',
            (site / page).read_text(),
        )
        assert [page if link == "#" else link for link in sidebar] == PAGES[1:]


class Prose(HTMLParser):
    """The text of a page's article, without its equations."""

    unseen = {"math", "headerlink", "toctree-wrapper"}
    void = {"area", "br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"}

    def __init__(self, html):
        super().__init__()
        self.text, self.skipped = [], 0
        self.feed(re.search(r"<article.*?</article>", html, re.S)[0])

    def handle_starttag(self, tag, attributes):
        classes = set((dict(attributes).get("class") or "").split())
        if tag not in self.void and (self.skipped or classes & self.unseen):
            self.skipped += 1

    def handle_endtag(self, tag):
        if self.skipped and tag not in self.void:
            self.skipped -= 1

    def handle_data(self, data):
        if not self.skipped:
            self.text.append(data)


def words(text):
    """Letters and digits alone: what typography and markup leave as it is."""
    return "".join(re.findall(r"\w+", text))


def paragraphs(source):
    """Headings, paragraphs and table cells of markdown, without its equations."""
    markdown = MarkdownIt().enable("table").use(amsmath_plugin)
    markdown.use(dollarmath_plugin, double_inline=True)
    spoken = {"text", "code_inline", "softbreak"}
    for block in markdown.parse(source):
        if block.type == "inline":
            parts = [part for part in block.children if part.type in spoken]
            yield " ".join(part.content for part in parts)
        elif block.type in ("fence", "code_block"):
            yield block.content


@pytest.mark.parametrize("name", ["index.ipynb", *NOTEBOOKS])
def test_page_has_all_the_prose_of_its_notebook_in_order(site, name):
    cells = json.loads((ROOT / "nbs" / name).read_text())["cells"]
    page = re.sub(r"^\d+[a-z]*_", "", name.replace(".ipynb", ".html"))
    text, position = words(" ".join(Prose((site / page).read_text()).text)), 0
    for cell in cells:
        if cell["cell_type"] != "markdown":
            continue
        for paragraph in paragraphs("".join(cell["source"])):
            found = text.find(words(paragraph), position)
            assert found >= 0, f"{page} lacks, or has elsewhere: {paragraph}"
            position = found + len(words(paragraph))


def test_every_exported_name_is_described(parsed):
    for module in pkgutil.iter_modules(cpc_nb.__path__, "cpc_nb."):
        if module.name.rpartition(".")[2].startswith("_"):
            continue
        page = PAGE_OF_MODULE[module.name.rpartition(".")[2]]
        names = [
            name
            for name, value in vars(importlib.import_module(module.name)).items()
            if callable(value)
            and getattr(value, "__module__", "") == module.name
            and not name.startswith("_")
            and hasattr(value, "__qualname__")
        ]
        missing = [
            name for name in names if f"{module.name}.{name}" not in parsed[page].ids
        ]
        assert not missing, f"{module.name}: {missing}"


def test_fields_of_the_configuration_have_lines_that_links_lead_to(site, parsed):
    fields = {
        f"{section}.{name}": f"cpc_nb.config.{about.annotation.__name__}.{name}"
        for section, about in Config.model_fields.items()
        for name in getattr(about.annotation, "model_fields", {})
    }
    assert len(fields) > 40 and set(fields.values()) <= parsed["config.html"].ids
    unlinked = r'<code class="docutils literal notranslate"><span class="pre">([^<]*)'
    for page in PAGES:
        assert not set(fields) & set(re.findall(unlinked, (site / page).read_text()))
    anchor = fields["loss.candidates"]
    assert f"config.html#{anchor}" in parsed["negatives.html"].links


def test_no_link_is_dead_and_nothing_is_loaded_from_elsewhere(site, parsed):
    dead, foreign = [], []
    for name, page in parsed.items():
        foreign += [
            (name, source)
            for source in page.sources
            if re.match(r"(https?:)?//", source)
        ]
        for link in page.links + page.sources:
            if re.match(r"[a-z]+:", link):
                continue
            path, anchor = urldefrag(link.split("?")[0])
            target = (site / name).parent / unquote(path) if path else site / name
            other = parsed.get(os.path.relpath(target.resolve(), site))
            if (
                not target.exists()
                or anchor
                and other
                and unquote(anchor) not in other.ids | {""}
            ):
                dead.append((name, link))
    assert not dead and not foreign


def test_every_image_has_words_for_those_who_do_not_see_it(parsed):
    """Without a `fig-alt`, myst-nb describes a figure by the name of its file."""
    for name, page in parsed.items():
        for image in page.images:
            words = image.get("alt") or ""
            assert words.strip() and words != image["src"], f"{name}: {image}"


def test_a_page_with_its_images_is_small(site, parsed):
    for name, page in parsed.items():
        files = {(site / name).parent / unquote(image["src"]) for image in page.images}
        sizes = [file.stat().st_size for file in (site / name, *files)]
        assert sum(sizes) < 3_000_000, f"{name}: {sizes}"


def test_source_of_what_is_exported_is_one_click_away(parsed):
    links = [
        link
        for page in PAGES
        for link in parsed[page].links
        if link.startswith("_modules/")
    ]
    assert links and all(
        urldefrag(link)[1] in parsed[urldefrag(link)[0]].ids for link in links
    )


def test_nbdev_docs_can_process_the_notebooks(tmp_path):
    """What `nbdev_docs` does before it calls Quarto."""
    for part in ("nbs", "cpc_nb", "settings.ini"):
        (shutil.copytree if (ROOT / part).is_dir() else shutil.copy)(
            ROOT / part, tmp_path / part
        )
    (tmp_path / "process.py").write_text(
        "from nbdev.serve import proc_nbs\n"
        "if __name__ == '__main__': proc_nbs(force=True, n_workers=0)\n"
    )
    result = subprocess.run(
        [sys.executable, "process.py"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in (tmp_path / "_proc").glob("*.ipynb")) == sorted(
        [*NOTEBOOKS, "index.ipynb"]
    )


# --- in a browser ---


@pytest.fixture(scope="module")
def address(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def watch(tab, address):
    """What `tab` complains of or asks for outside of the site, as a growing list."""
    troubles = []

    def console(message):
        if message.type in ("error", "warning"):
            troubles.append(message.text)

    def failed(request):
        if "ERR_ABORTED" not in (request.failure or ""):
            troubles.append(f"failed: {request.url}")

    def response(response):
        if response.status >= 400:
            troubles.append(f"{response.status} {response.url}")

    def request(request):
        if not request.url.startswith((address, "file:", "data:", "blob:")):
            troubles.append(request.url)

    tab.on("console", console)
    tab.on("pageerror", lambda error: troubles.append(str(error)))
    tab.on("requestfailed", failed)
    tab.on("response", response)
    tab.on("request", request)
    return troubles


@pytest.fixture
def tab(browser, address):
    """A page that must neither complain nor ask for anything outside of the site."""
    tab = browser.new_page()
    troubles = watch(tab, address)
    yield tab
    tab.close()
    assert troubles == []


TYPESET = """() => {
    const equations = [...document.querySelectorAll('.math')];
    const typeset = equation => equation.querySelector('mjx-container svg');
    const faulty = document.querySelector('mjx-merror, [data-mjx-error]');
    return equations.every(typeset) && !faulty;
}"""


WIDTHS = (390, 768, 1024, 1280, 1320, 1366, 1400, 1920)
WIDER_THAN_THE_WINDOW = """() =>
    [document.documentElement, document.querySelector('.content')]
        .some(element => element.scrollWidth > element.clientWidth)"""
SCROLLED = """() => {
    document.querySelectorAll('details.hide').forEach(fold => fold.open = true);
    return [...document.querySelectorAll('article pre')]
        .filter(block => block.scrollWidth > block.clientWidth)
        .map(block => block.textContent);
}"""


PLAY = """async () => {
    const sounds = [...document.querySelectorAll('audio')];
    for (const sound of sounds) {
        sound.muted = true;
        await sound.play();  // rejects what cannot be decoded
        sound.pause();
    }
    return sounds.map(sound => sound.duration);
}"""


def stored_sounds(page: str) -> int:
    """How many players the notebook of a page stores."""
    name = ["index.ipynb", *NOTEBOOKS][PAGES.index(page)]
    cells = json.loads((ROOT / "nbs" / name).read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    pages = [output.get("data", {}).get("text/html", "") for output in outputs]
    return sum("".join(page).count("<audio") for page in pages)


ASKED = set()  # kinds of elements whose colours were checked on an earlier page


@pytest.mark.parametrize("page", PAGES)
def test_page_is_seen_and_heard_at_every_width_and_by_everybody(tab, address, page):
    tab.goto(f"{address}/{page}")
    tab.wait_for_function(TYPESET)
    assert tab.locator("h1").count() == 1
    assert tab.evaluate(
        "[...document.images].every(image => image.complete && image.naturalWidth > 0)"
    )
    durations = tab.evaluate(PLAY)
    assert len(durations) == stored_sounds(page) and all(durations), durations
    name = page.removesuffix(".html")
    keep_screenshot(tab, f"docs-{name}")
    keep_screenshot(tab, f"docs-{name}-phone", width=390)
    assert misfits(tab) == []
    assert violations(tab, ASKED) == []


def misfits(tab):
    """The widths at which a page scrolls sideways, or on a wide screen code does."""
    found = []
    for width in WIDTHS:
        tab.set_viewport_size({"width": width, "height": 900})
        if tab.evaluate(WIDER_THAN_THE_WINDOW):
            found.append(f"page at {width} pixels")
        if width >= 1400 and (code := tab.evaluate(SCROLLED)):
            found.append(f"code at {width} pixels: {code}")
    return found


def test_equations_are_typeset_without_a_server(tab, site):
    tab.goto((site / "loss.html").as_uri())
    tab.wait_for_function(TYPESET)
    assert tab.locator("mjx-container").count() > 0


def search(tab, address, query):
    tab.goto(f"{address}/index.html")
    tab.locator("input[name=q]").first.fill(query)
    tab.locator("input[name=q]").first.press("Enter")
    tab.wait_for_selector("ul.search li a")


@pytest.mark.parametrize("query", ["InfoNCE", "loss", "softmax"])
def test_search_shows_no_tex(tab, address, query):
    search(tab, address, query)
    tab.wait_for_selector("ul.search p.context")
    tab.wait_for_load_state("networkidle")
    shown = " ".join(tab.locator("ul.search li").all_inner_texts())
    assert query.lower() in shown.lower()
    assert not re.findall(r"\\[()\[\]]|\\[a-z]{2}|\w_\{|\$", shown)


@pytest.mark.parametrize(
    "query, page",
    [
        ("negatives", "negatives.html"),
        ("InfoNCE", "loss.html#cpc_nb.loss.InfoNCE"),
        ("patience", "config.html#cpc_nb.config.TrainConfig.patience"),
    ],
)
def test_search_finds(tab, address, query, page):
    search(tab, address, query)
    results = tab.locator("ul.search li a").evaluate_all(
        "links => links.map(link => link.href)"
    )
    assert any(link.endswith(page) for link in results), results


def test_link_to_a_field_shows_its_line(tab, address):
    tab.goto(f"{address}/negatives.html")
    tab.locator("article a", has_text="loss.candidates").click()
    line = tab.locator("tr:has(:target)")
    line.wait_for()
    assert line.locator("td").first.inner_text() == "candidates"
    tab.wait_for_function(
        """() => {
            const { top } = document.querySelector(':target').getBoundingClientRect();
            return 0 <= top && top < window.innerHeight;
        }"""
    )


def test_code_of_an_export_unfolds(tab, address):
    tab.goto(f"{address}/negatives.html")
    fold = tab.locator("details.hide").first
    code = fold.locator("div.highlight").first
    assert not code.is_visible()
    fold.locator("summary").click()
    code.wait_for(state="visible")


def test_code_that_is_folded_in_a_row_has_one_fold(tab, address):
    tab.goto(f"{address}/explorer.html")
    fold = "div.cell:has(> details.hide:only-child)"
    assert tab.locator(fold).count() > 5
    assert tab.locator(f"{fold} + {fold}").count() == 0


@pytest.mark.parametrize(
    "page",
    [
        "genindex.html",
        "search.html",
        "_modules/index.html",
        "_modules/cpc_nb/norm.html",
    ],
)
def test_other_pages_can_be_read_with_little_sight_and_without_a_mouse(
    tab, address, page
):
    tab.goto(f"{address}/{page}")
    assert violations(tab) == []


def test_the_report_of_a_run_can_be_read_and_heard_on_a_phone(tab, tmp_path):
    results = json.loads((ROOT / "nbs" / "results" / "demo.json").read_text())
    metrics = results["runs"][0]
    for name, plot in {"speaker": plot_speakers, "frames": plot_frames}.items():
        plot(metrics).savefig(tmp_path / f"{name}.png")
    soundfile.write(tmp_path / "voice-1.mp3", voice(1, 0, 2.0), RATE)
    page = tmp_path / "report.html"
    page.write_text(report(metrics, make_config("demo"), tmp_path))
    tab.set_viewport_size({"width": 390, "height": 900})
    tab.goto(page.as_uri())
    keep_screenshot(tab, "report", width=390)
    assert tab.locator("img").count() == 2 and min(tab.evaluate(PLAY)) > 1
    assert violations(tab) == []
