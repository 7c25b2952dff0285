"""Rows of local data files as plain Python values: which files a name stands for, and a reader for each kind of file.

`files.select_files` lists the files, `rows.read_rows` reads one of them. Every value stays what the file says: a cell of a
CSV file is its text, a JSON value is what Python's json module makes of it. Nothing is inferred from other rows or files,
and nothing is kept in a cache, so that a replaced file is read anew. `data/documents.py` puts both together.
"""
