"""How `make docs` renders these pages: Sphinx with MyST for Markdown, its own theme, nothing loaded from elsewhere.

The source folder is the root of the repository, so that links between pages, examples and figures are the same here and
where the files are read as they are.
"""

from importlib.metadata import version as installed

project = "Video-Ma²mba"
copyright = "the video-ma2mba maintainers"
release = version = installed("video-ma2mba")
root_doc = "docs/index"
include_patterns = [
    "docs/**.md", "examples/*/README.md", "model_cards/video-ma2mba-tiny/README.md", "CONTRIBUTING.md", "CHANGELOG.md"
]  # fmt: skip
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_parser"]

default_role = "code"  # docstrings quote names as Markdown does
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_use_rtype = False
myst_heading_anchors = 3

html_theme = "alabaster"
html_theme_options = {"description": "watches every frame of a video", "page_width": "1100px", "fixed_sidebar": True}
html_sidebars = {"**": ["about.html", "navigation.html", "searchbox.html"]}
html_copy_source = html_show_sourcelink = html_show_sphinx = False
