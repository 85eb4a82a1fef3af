"""The documentation as a site: `make docs` builds it into build/docs/html, warnings being errors."""

from sphinx.application import Sphinx

import pspnet_fast

project = "pspnet_fast"
author = "the authors of pspnet_fast"
copyright = "BSD-3-Clause"
release = pspnet_fast.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns: list[str] = []
html_theme = "furo"
html_title = f"pspnet_fast {release}"
html_copy_source = False

myst_heading_anchors = 4  # links such as data.md#labels, which a repository page has as well
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_use_rtype = False
python_use_unqualified_type_names = True
default_role = "code"  # docstrings write code in single backticks

nitpicky = True
# Types: torch's and Python's own pages would have to be fetched, and docstrings say shapes and dtypes in words.
nitpick_ignore_regex = [("py:(class|obj|exc|data)", ".*")]


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", keep_whole, priority=400)  # before napoleon


def keep_whole(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Of an attribute's docstring napoleon would take the words before a colon for its type."""
    if what in ("attribute", "property"):
        lines.insert(0, "")
