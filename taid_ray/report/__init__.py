"""Reports of runs and searches, read back from their files: history, notes, plots, pages, the model card. Free of Ray.

Others use `run_page.write_run_report`, `search_page.write_report`, `search_results.read_search`, `run_notes`, `search_notes`,
`card` (model card, closing table) and `format`. The driver writes card and report at the end of a run; workers draw nothing.

Traps:
- `page` is the HTML frame of both pages; they load nothing from elsewhere.
- `run_plots` and `search_plots` draw without pyplot, which is not safe beside threads.
"""
