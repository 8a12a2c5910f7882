"""Sphinx configuration of the docs site; `build.py` lays out its pages."""

import importlib.util
from configparser import ConfigParser
from pathlib import Path

from roles import Field

here = Path(__file__).resolve().parent
settings = ConfigParser(delimiters=["="], interpolation=None)
settings.read(here.parents[1] / "settings.ini", encoding="utf-8")
settings = settings["DEFAULT"]

project = settings["title"]
copyright = settings["copyright"]
author = settings["author"]
version = release = settings["version"]

extensions = ["myst_nb", "sphinx.ext.mathjax", "sphinx.ext.viewcode"]
exclude_patterns = ["_*"]
add_module_names = False
maximum_signature_line_length = 78
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"
viewcode_line_numbers = True

# Notebooks: saved outputs, never executed.
suppress_warnings = ["myst.header"]
nb_execution_mode = "off"
nb_ipywidgets_js = {}
nb_merge_streams = True
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"
nb_render_markdown_format = "myst"
myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 4
myst_dmath_double_inline = True

# Equations without a network: `django-static-mathjax` brings the one script.
[_mathjax] = importlib.util.find_spec("mathjax").submodule_search_locations
mathjax_path = "tex-svg.js"
mathjax3_config = {"options": {"enableMenu": False}, "svg": {"scale": 0.95}}

html_theme = "furo"
html_title = f"{project} {version}"
html_static_path = [
    str(here / "static"),
    f"{_mathjax}/static/mathjax/es5/{mathjax_path}",
]
html_favicon = str(here / "static" / "favicon.svg")
html_css_files = ["cpc_nb.css"]
html_js_files = ["scrolling.js"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False


def add_scripts(app, pagename, *context):
    if pagename == "search":
        app.add_js_file("search.js")


def setup(app):
    app.add_role("field", Field())
    app.connect("html-page-context", add_scripts)
