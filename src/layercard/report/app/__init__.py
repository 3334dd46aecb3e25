"""The app (`layercard app`): cards explored in a browser.

What it does lies in pure functions that know nothing of a page: `library` (the files), `choice` (sliders to a placement), `trainer`
(settings for other trainers), `jobs` (profiling in a process of its own), `views` (values to HTML). `pages` and `server` wire them to
Gradio, which only these two import.
"""
