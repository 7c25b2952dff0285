"""The teacher's outputs kept per sample: the store on disk, the client in front of a teacher, the teacher that is only a cache.

Others use `store.CacheStore`, `cached.CachedTeacher`, `offline` (OfflineTeacher, find_record) and `claims`.

Traps:
- A row of a batch is cut into its documents again (`samples`), because the cache is keyed by sample and not by row.
- Who computes what several ask for is agreed in the pool's lease (`claims`); who does not see our cache must not wait for it.
- The cache never fails a run: an unreadable entry is a miss, a failed write is dropped, and both are counted.
"""
