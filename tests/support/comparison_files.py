"""The files of a comparison that nobody ran: what its results, tables and page are tested with."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from taid_ray.compare.evaluation import Evaluation
from tests.support.search_files import Written, write_search

DOCUMENTS = 12
TOKENS = [10 + number for number in range(DOCUMENTS)]


def evaluation(cross_entropy: float, rouge: float | None = None) -> Evaluation:
    """One whose cross-entropy differs by document around a mean over tokens of `cross_entropy`; KL is 1 less."""
    swing = [0.2 * (-1) ** number for number in range(DOCUMENTS)]
    shift = sum(value * tokens for value, tokens in zip(swing, TOKENS, strict=True)) / sum(TOKENS)
    values = [cross_entropy - shift + value for value in swing]
    by_document = {name: [v - less for v in values] for name, less in (("cross_entropy", 0), ("forward_kl", 1.0))}
    by_document |= {
        "reverse_kl": by_document["forward_kl"],
        "head_mass": [0.9] * DOCUMENTS,
        "tail_mass": [1e-6] * DOCUMENTS,
    }
    mean = {
        "cross_entropy": cross_entropy,
        "forward_kl": cross_entropy - 1,
        "reverse_kl": cross_entropy - 1,
        "head_mass": 0.9,
        "tail_mass": 1e-6,
        "calibration_error": 0.03,
        "head_mass_of_the_mean": 0.24,
        "tail_mass_of_the_mean": 1e-4,
    }
    return Evaluation(
        documents=[str(number) for number in range(1, DOCUMENTS + 1)],
        tokens=TOKENS,
        by_document=by_document,
        mean=mean | ({} if rouge is None else {"rouge_l": rouge}),
        calibration=[{"up_to": 1.0, "count": 5.0, "confidence": 0.97, "accuracy": 0.9}],
        rouge_documents=[] if rouge is None else ["1", "2", "3"],
        rouge_l=[] if rouge is None else [rouge - 0.01, rouge, rouge + 0.01],
        teacher={"cross_entropy": 1.5, "head_mass": 0.91, "tail_mass": 1e-7, "calibration_error": 0.02},
    )


def write_comparison(
    directory: Path, methods: Mapping[str, Sequence[float | None]], rouge: Mapping[str, float] | None = None
) -> Path:
    """Writes the directory. methods: cross-entropy by seed, from 0; None for a run that failed. rouge: by method."""
    seeds = len(next(iter(methods.values())))
    trials = [
        Written(
            params={"variant": method, "train.seed": seed},
            figure=0.0 if found[seed] is None else found[seed] - 1.5,
            status="failed" if found[seed] is None else "finished",
            error="out of memory" if found[seed] is None else "",
        )
        for seed in range(seeds)
        for method, found in methods.items()
    ]
    space = {"variant": {"choice": [*methods]}, "train.seed": {"choice": [*range(seeds)]}}
    variants: dict[str, Any] = {method: {"loss": {"name": "taid"}} for method in methods}
    write_search(directory, trials, space, search="grid", metric="cross_entropy", variants=variants)
    for number, trial in enumerate(trials, start=1):
        method = trial.params["variant"]
        if trial.status == "finished":
            found = evaluation(trial.figure + 1.5, rouge and rouge[method])
            (directory / f"trials/{number:04d}/evaluation.json").write_text(json.dumps(found.as_json()))
    (directory / "memory.json").write_text(
        json.dumps({method: 2**20 * (100 + number) for number, method in enumerate(methods)})
    )
    return directory
