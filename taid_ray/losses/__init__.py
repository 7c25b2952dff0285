"""The losses: functions of student and teacher logits, and the chunked loss that gets by without [N, V] matrices.

A loss is a function `(student_logits [N, V], teacher_logits [N, V], ...) -> [N]` in float32, N = loss positions: no mask, no
reduction, and N = 0 works. `registry` knows them by their names in the configuration; `chunked_loss` computes any of them
from hidden states, a chunk of tokens at a time. Pure torch: neither Ray nor DeepSpeed nor transformers is loaded. This is
the one room whose `__init__` re-exports its public functions, because nothing heavy comes along.

Traps:
- Functions whose name ends in `_` overwrite an argument; the table in `chunked` says whose memory holds what, and when.
- Numbers are tested against `tests/golden` (the reference implementation) or a plainly written single-process loop.
"""

from taid_ray.losses.adaptive_kl import adaptive_kl
from taid_ray.losses.chunked import LossParts, Scores, Target, chunk_tokens_for, chunked_loss, chunked_scores
from taid_ray.losses.decoupled import dkd
from taid_ray.losses.divergences import entropy, forward_kl, reverse_kl, sft, tvd
from taid_ray.losses.learned_temperature import LearnedTemperature, ctkd, reversal_strength
from taid_ray.losses.mixtures import gkd, js, skew_forward_kl, skew_reverse_kl
from taid_ray.losses.objective import Objective
from taid_ray.losses.projection import LogitTransform, Projection
from taid_ray.losses.registry import Divergence, divergence, log_target
from taid_ray.losses.taid import taid, taid_reverse_kl
from taid_ray.losses.topk import TopK

__all__ = [
    "Divergence",
    "LearnedTemperature",
    "LogitTransform",
    "LossParts",
    "Objective",
    "Projection",
    "Scores",
    "Target",
    "TopK",
    "adaptive_kl",
    "chunk_tokens_for",
    "chunked_loss",
    "chunked_scores",
    "ctkd",
    "divergence",
    "dkd",
    "entropy",
    "forward_kl",
    "gkd",
    "js",
    "log_target",
    "reversal_strength",
    "reverse_kl",
    "sft",
    "skew_forward_kl",
    "skew_reverse_kl",
    "taid",
    "taid_reverse_kl",
    "tvd",
]
