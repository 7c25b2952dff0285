"""Commands of `taid-ray`, the quickstart's texts, and the entry point of submitted jobs (`python -m taid_ray.cli.job`).

Commands import what is slow only when they run: `taid-ray --help` and a wrong configuration answer within a second.
"""
