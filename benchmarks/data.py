"""The store of encoded data: how fast documents are encoded, and rows read, by one rank alone and by one among 512.

Documents are the bundled stories, repeated with a number of their own, encoded with the bundled tokenizer. A rank reads its
rows of global batches of a warm store as a run does, and collates them. The index has a million rows: the shards again and
again. Times are medians; of encoding, processor time is given, too, because a busy neighbour shows in the wall time.
"""

import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.table import Table
from transformers import AutoTokenizer

from benchmarks.common import ROOT, PeakMemory, in_fresh_process, median, write
from taid_ray.config.data import DataSource
from taid_ray.data.batch import collate
from taid_ray.data.reading.kinds import DataFile
from taid_ray.data.store.index import Index, write_index
from taid_ray.data.store.order import GlobalOrder
from taid_ray.data.store.prepare import Encoding, prepare_span
from taid_ray.data.store.reader import BatchReader, StoredRows
from taid_ray.data.store.shard import ShardFacts
from taid_ray.data.store.spans import Span

QUICKSTART = ROOT / "taid_ray" / "quickstart"
LENGTH = 2048
FILE_MIB, FILES_PER_TASK, ROUNDS = 3, 2, 3
TARGET_SCALING, TARGET_READ, TARGET_RANK = 0.85, 20e6, 1.5
INDEX_ROWS, SMALL_INDEX_ROWS = 1_000_000, 10_000
ROWS_PER_RANK = (8, 64)
RANKS = 512
READS = 60


def main() -> None:
    with TemporaryDirectory(prefix="bench-data-") as name:
        directory = Path(name)
        spans = [Span(file, "all") for file in write_files(directory)]
        encoding = measure_encoding(directory, spans)
        small, large = (index_of(directory, rows) for rows in (SMALL_INDEX_ROWS, INDEX_ROWS))
        reading = in_fresh_process(measure_reading, large)
        memory = [in_fresh_process(measure_memory, path) for path in (small, large)]
    write(
        "data",
        {"row_length": LENGTH, "encoding": encoding, "reading": reading, "memory": memory},
        [encoding_table(encoding), reading_table(reading), memory_table(memory)],
    )


def write_files(directory: Path) -> list[DataFile]:
    """Files of FILE_MIB, each of which is one span, for two tasks and every round."""
    with (QUICKSTART / "tinystories_train.jsonl").open(encoding="utf-8") as lines:
        stories = [json.loads(line)["text"] for line in lines]
    numbers, files = count(), []
    for name in range(2 * FILES_PER_TASK):
        path, size = directory / f"{name}.jsonl", 0
        with path.open("w", encoding="utf-8") as file:
            while size < FILE_MIB * 2**20:
                number = next(numbers)
                size += file.write(json.dumps({"text": f"{number} {stories[number % len(stories)]}"}) + "\n")
        files.append(DataFile(path, path.name, "json"))
    return files


# --- encoding


def measure_encoding(directory: Path, spans: list[Span]) -> dict[str, Any]:
    """One task with FILES_PER_TASK spans, and two with as many each, in turns, every time into an empty store."""
    seconds: dict[int, list[float]] = {1: [], 2: []}
    busy: dict[int, list[float]] = {1: [], 2: []}
    tokens = {1: 0, 2: 0}
    with tasks() as pools:
        for number in range(ROUNDS):
            for count_, pool in pools.items():
                store = directory / f"store-{count_}-{number}"
                store.mkdir()
                chosen = spans[: count_ * FILES_PER_TASK]
                start = time.perf_counter()
                found = list(pool.map(encode, chosen, [store] * len(chosen)))
                seconds[count_].append(time.perf_counter() - start)
                busy[count_].append(sum(spent for spent, _ in found))
                tokens[count_] = sum(facts["tokens"] for _, facts in found)
    (directory / f"store-2-{ROUNDS - 1}").rename(directory / "store")
    (directory / "shards.json").write_text(json.dumps([facts for _, facts in found]))
    scaling = median(seconds[1]) / median(seconds[2])
    return {
        "tokens_per_s": {n: tokens[n] / median(seconds[n]) for n in tokens},
        "tokens_per_cpu_s": {n: tokens[n] / median(busy[n]) for n in tokens},
        "weak_scaling": scaling,
        "target": {"weak_scaling": TARGET_SCALING, "met": scaling >= TARGET_SCALING},
    }


@contextmanager
def tasks() -> Iterator[dict[int, ProcessPoolExecutor]]:
    """Pools of one and of two processes that are ready to encode, with one thread each."""
    os.environ.update(OMP_NUM_THREADS="1", RAYON_NUM_THREADS="1")
    context = multiprocessing.get_context("spawn")
    pools = {n: ProcessPoolExecutor(n, mp_context=context) for n in (1, 2)}
    for n, pool in pools.items():
        list(pool.map(time.sleep, [0.5] * n))  # every process has started
        list(pool.map(_encoding, range(4 * n)))
    yield pools
    for pool in pools.values():
        pool.shutdown()


_made: list[Encoding] = []


def _encoding(_: int = 0) -> str:
    if not _made:
        tokenizer = AutoTokenizer.from_pretrained(QUICKSTART / "stories260k")
        _made.append(Encoding(DataSource(train="stories", sequence_length=LENGTH), tokenizer))
    return _made[0].key


def encode(span: Span, store: Path) -> tuple[float, dict[str, Any]]:
    """Prepares a span in this process. Returns processor seconds and the shard's facts."""
    _encoding()
    start = time.process_time()
    facts = prepare_span(span, _made[0], store, print)
    assert facts is not None
    return time.process_time() - start, facts.to_dict()


# --- reading


def index_of(directory: Path, rows: int) -> Path:
    """Writes the index of a data set of at least so many rows: the shards again and again."""
    shards = [ShardFacts.from_dict(facts) for facts in json.loads((directory / "shards.json").read_text())]
    repeats = -(-rows // sum(shard.rows for shard in shards))
    return Path(write_index(directory / "store", shards * repeats, print))


def measure_reading(path: Path) -> dict[str, Any]:
    """A lone rank, and one of RANKS, with the same number of rows of an index, in turns."""
    index = Index(path)
    stored, total = StoredRows([index]), index.totals.rows
    cases = []
    for rows in ROWS_PER_RANK:
        readers = {n: BatchReader(stored, GlobalOrder(total, 0), n * rows) for n in (1, RANKS)}
        seconds: dict[int, list[float]] = {n: [] for n in readers}
        tokens: dict[int, list[int]] = {n: [] for n in readers}
        for step in range(READS):
            for ranks, reader in readers.items():
                start = time.perf_counter()
                found = reader.read(step, ranks // 2, ranks)
                collate(found.rows)
                seconds[ranks].append(time.perf_counter() - start)
                tokens[ranks].append(sum(len(row.input_ids) for row in found.rows))
        alone, among = (median(seconds[n]) for n in readers)
        cases.append(
            {
                "rows": rows,
                "alone_ms": 1000 * alone,
                "among_ms": 1000 * among,
                "ratio": among / alone,
                "alone_tokens_per_s": median(tokens[1]) / alone,
                "among_tokens_per_s": median(tokens[RANKS]) / among,
            }
        )
    met = all(case["ratio"] <= TARGET_RANK and case["alone_tokens_per_s"] >= TARGET_READ for case in cases)
    return {
        "ranks": RANKS,
        "index_rows": total,
        "cases": cases,
        "target": {"ratio": TARGET_RANK, "tokens_per_s": TARGET_READ, "met": met},
    }


def measure_memory(path: Path) -> dict[str, Any]:
    """Peak memory of a rank that reads READS batches, the pages of the index that it touched included."""
    collate([])  # what torch loads first
    with PeakMemory() as memory:
        index = Index(path)
        total = index.totals.rows
        reader = BatchReader(StoredRows([index]), GlobalOrder(total, 0), RANKS * ROWS_PER_RANK[0])
        for step in range(READS):
            collate(reader.read(step, 0, RANKS).rows)
    return {"rows": total, "index_mib": path.stat().st_size / 2**20, "peak_mib": memory.bytes / 2**20}


# --- tables


def encoding_table(found: dict[str, Any]) -> Table:
    met = "met" if found["target"]["met"] else "NOT met"
    table = Table(title=f"Encoding; weak scaling {found['weak_scaling']:.2f} (target {TARGET_SCALING}: {met})")
    for column in ("tasks", "tokens/s", "tokens per second of processor time"):
        table.add_column(column, justify="right")
    for n in found["tokens_per_s"]:
        table.add_row(str(n), f"{found['tokens_per_s'][n]:,.0f}", f"{found['tokens_per_cpu_s'][n]:,.0f}")
    return table


def reading_table(found: dict[str, Any]) -> Table:
    met = "met" if found["target"]["met"] else "NOT met"
    table = Table(
        title=f"Reading and collating rows of {LENGTH:,} tokens, {found['index_rows']:,} in all (targets: "
        f"{TARGET_READ / 1e6:g} million tokens/s alone, {TARGET_RANK}x as long among {RANKS}: {met})"
    )
    for column in ("rows per rank", "alone, ms", "tokens/s", f"among {RANKS}, ms", "tokens/s", "ratio"):
        table.add_column(column, justify="right")
    for case in found["cases"]:
        table.add_row(
            str(case["rows"]),
            f"{case['alone_ms']:.2f}",
            f"{case['alone_tokens_per_s']:,.0f}",
            f"{case['among_ms']:.2f}",
            f"{case['among_tokens_per_s']:,.0f}",
            f"{case['ratio']:.2f}",
        )
    return table


def memory_table(found: list[dict[str, Any]]) -> Table:
    table = Table(title="Memory that reading adds to a rank, at its peak")
    for column in ("rows of the data", "index, MiB", "memory, MiB"):
        table.add_column(column, justify="right")
    for case in found:
        table.add_row(f"{case['rows']:,}", f"{case['index_mib']:.1f}", f"{case['peak_mib']:.1f}")
    return table


if __name__ == "__main__":
    main()
