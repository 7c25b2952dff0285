"""The teacher as Ray actors: a Ray Serve application whose replicas are groups of tensor-parallel processes.

Others use `lifecycle` (start_pool, stop_pool, PoolWatch), `client` (PoolTeacher, replica_states) and `lease` (keep_lease,
PoolClaims).

Traps:
- One Serve application per run: `serve.delete`, never `serve.shutdown`. Replicas return values, never references.
- `client` has one thread that takes the answers in order; `request` handles lost, late and damaged ones. All copies of a request
  carry one id, so that the replica that has it already refuses another copy, which then reaches another replica.
- The bytes of a request's images are one object in Ray's store, to which all its copies refer. The replica waits for it before
  the request's turn, so that bytes that are lost break the request and not the replica. The leader makes pixels of them, and the
  other shards (`shard`) get those.
- The number of replicas always comes from an autoscaling policy in Serve's controller that repeats what the lease says
  (`autoscaling`), whether it is fixed, by load, or asked for with `taid-ray scale`.
- Rank 0 asks the replicas for the teacher's head and hands it on through the object store (`shared_head`), so `head` is a
  collective call.
- The lease is renewed by the driver and by one worker of each run, and removes the pool when all of them are gone.
- Serve streams a replica's answers, and such a stream's end blocks the replica until the caller has acknowledged it: a
  caller on a host that was cut off stops the pool for minutes. `deployment.CALLER_GONE`, the replicas' environment, makes
  that seconds.
"""
