"""The app (`layercard app`): cards explored in a browser.

What it does lies in functions that know nothing of a page: `library` (files, sliders to a placement, savings), `jobs` (profiling in a
process of its own), `views` (values to HTML and figures) and `explorer` (what the page asks for). `pages` and `server` wire them to Gradio,
which only these two import.
"""
