"""Keeping the teacher's outputs per sample: the store on disk, a client in front of the teacher, a teacher that is only a cache.

Others use `store.CacheStore`, `cached.CachedTeacher`, `offline` (OfflineTeacher, find_record) and `claims`. `outputs` and
`outputs_file` write and read a parquet file of a cache's content, or of another tool's.

Traps:
- A row of a batch is cut into its samples again (`samples`), because an entry is kept for each sample and serves any row.
- Clients agree on who computes a sample in the pool's lease (`claims`). A claim names the cache's directory, too (its `scope`),
  because a client that uses another directory would wait in vain.
- What comes from a file has a fingerprint of its own, so that it is never taken for what the teacher itself computed.
- The cache never fails a run: an entry that cannot be read is computed again, one that cannot be written is dropped.
"""
