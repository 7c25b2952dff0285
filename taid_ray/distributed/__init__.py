"""Devices, process groups, and the Ray cluster that a run joins; whether the run fits there.

Others use `world.World` (rank, size, sums over ranks), `device` (resolve, torch_device), `cluster` (ray_cluster,
join_cluster), `capacity` (Demand and the checks against the cluster's nodes) and `network.RayNetworkConfig`.

Traps:
- gloo takes the interface of Ray's node address, not the one that the host's name resolves to (`network`).
- A group whose processes did not find each other must give its room back; Ray Train forgets it (`network`).
- All private functions of Ray that the package uses stand in `ray_internals`; pyproject.toml bounds Ray's version for them.
"""
