# SPDX-License-Identifier: GPL-2.0-only

"""How sphinx builds these documents; ``cargo xtask docs`` runs it."""

import pathlib
import tomllib

_workspace = pathlib.Path(__file__).parent.parent / "Cargo.toml"

project = "pmem"
author = "The pmem maintainers"
project_copyright = author
release = version = tomllib.loads(_workspace.read_text())["workspace"]["package"]["version"]

# A reference that leads nowhere is a warning.
nitpicky = True

html_theme = "alabaster"
html_theme_options = {"description": "Persistent memory disks for Linux, in Rust", "page_width": "1100px"}
html_copy_source = False

man_pages = [("pmem.4", "pmem", "disks in persistent memory", [author], 4)]
man_make_section_directory = True
