"""Benchmarks of taid-ray: `python -m benchmarks.NAME`, or `make bench` for all. See README.md in this directory."""
