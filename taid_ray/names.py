"""Names that several processes of a run find each other by."""

NAMESPACE = "taid-ray"
"""The Ray namespace of the named actors: a run's scheduler, a teacher pool's lease."""
POOL_PREFIX = "taid-teacher-"
"""Prefix of a teacher pool's Serve application; the run's or the search's id follows."""
