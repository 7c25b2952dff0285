"""Keeping the teacher's outputs per sample: the store on disk, a client in front of the teacher, a teacher that is only a cache.

Others use `store.CacheStore`, `cached.CachedTeacher`, `offline` (OfflineTeacher, find_record) and `claims`.

Traps:
- A row of a batch is cut into its samples again (`samples`), because an entry is kept for each sample and serves any row.
- Clients agree on who computes a sample in the pool's lease (`claims`). A claim names the cache's directory, too (its `scope`),
  because a client that uses another directory would wait in vain.
- The cache never fails a run: an entry that cannot be read is computed again, one that cannot be written is dropped.
"""
