"""The documentation site: ``make docs`` builds it, without a network, from these pages and the docstrings."""

project = "jaxfa"
project_copyright = "the jaxfa authors, Apache License 2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["tasklist"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "none"
add_module_names = False
napoleon_use_rtype = False
napoleon_use_ivar = True
highlight_language = "none"
html_theme = "furo"
html_title = "jaxfa"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False


def setup(app):
    """Leaves out the fields of named tuples, which "Attributes:" in the class's docstring describes."""
    app.connect("autodoc-skip-member", lambda app, what, name, member, skip, options: _is_field(member) or skip)


def _is_field(member):
    return type(member).__name__ == "_tuplegetter"
