"""A Forecast as tables on a terminal."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from taid_ray.plan.forecast_type import Forecast
from taid_ray.plan.notes import gib
from taid_ray.plan.time import CostEstimate
from taid_ray.plan.worker_memory import WorkerMemory
from taid_ray.report.format import print_line

RATES = {
    "teacher_s": "teacher, one request",
    "forward_s": "student's forward, one micro-batch",
    "loss_s": "loss",
    "backward_s": "backward",
    "optimizer_s": "optimizer, one step",
    "data_s": "making and sending a request",
    "request_s": "a request's way, there and back",
    "read_s": "reading and encoding one row",
}
"""Fields of rates.Rates that are seconds."""
WAITS = {
    "data": "reading the data",
    "others": "the slowest worker",
    "schedule": "the scheduler",
    "cores": "the cores, which all share",
    "teacher": "the teacher",
    "student": "nothing but the student",
}
"""Names of simulation.SimulatedStep.waits in words."""


def show(found: Forecast, console: Console) -> None:
    """All tables, at most 100 columns wide."""
    unit = found.hardware
    console.print(
        f"[bold]{found.name}[/bold] on {unit.name}{' cores' if unit.is_cpu else ''}: "
        f"{_si(unit.bfloat16_flops, 'FLOP/s')} bfloat16, {_si(unit.float32_flops, 'FLOP/s')} float32, "
        f"{_si(unit.memory_bytes, 'B')}, {_si(unit.bandwidth, 'B/s')}; assumed use {found.utilisation:.0%}",
        highlight=False,
    )
    tables = (models_table, worker_table, teacher_table, wire_table, calibration_table, time_table, scaling_table)
    for table in tables:
        if (made := table(found)) is not None:
            console.print(made)
    for line in found.notes:
        print_line(console, f"note: {line}")


def models_table(found: Forecast) -> Table:
    table = Table(title="models", title_justify="left", box=SIMPLE_HEAD)
    for column in ("", "parameters", "trained", "hidden size", "head rows"):
        table.add_column(column, justify="left" if not column else "right")
    for name, shape in (("teacher", found.teacher), ("student", found.student)):
        trained = _si(shape.trained) if shape is found.student else "-"
        table.add_row(name, _si(shape.parameters), trained, f"{shape.hidden_size:,}", f"{shape.head_rows:,}")
    return table


def worker_table(found: Forecast) -> Table:
    unit = _unit(max(memory.bytes for memory in found.worker_memory))
    table = Table(
        title=f"one of {found.workers} student worker(s), {unit} at its fullest moment",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    columns = ("ZeRO", "ckpt", "moment", "weights", "optim", "grads", "activ", "loss", "teacher", "other", "total")
    for column in (*columns, ""):
        table.add_column(column, justify="left" if column in ("ckpt", "moment", "") else "right")
    for memory in found.worker_memory:
        here = (memory.zero_stage, memory.checkpointing) == (found.zero_stage, found.checkpointing)
        table.add_row(*_worker_row(memory, unit), style="bold" if here else None)
    table.caption = "bold: as configured. ckpt: gradient checkpointing; grads: and buckets; teacher: head and answers"
    return table


def _worker_row(memory: WorkerMemory, unit: str) -> list[str]:
    parts = memory.parts
    groups = (
        ("weights", "gathered weights"),
        ("optimizer",),
        ("gradients", "communication"),
        ("activations",),
        ("loss",),
        ("teacher head", "prefetch window", "teacher"),
        ("reserved",),
    )
    cells = [_in(unit, sum(parts.get(name, 0.0) for name in group)) for group in groups]
    checkpointing = "yes" if memory.checkpointing else "no"
    total = _in(unit, memory.bytes)
    return [str(memory.zero_stage), checkpointing, memory.moment, *cells, total, _verdict(memory.fits)]


def teacher_table(found: Forecast) -> Table | None:
    """None unless the teacher has processes of its own."""
    if not found.teacher_memory:
        return None
    unit = _unit(max(rank.bytes for rank in found.teacher_memory))
    table = Table(title=f"one teacher process, {unit}", title_justify="left", box=SIMPLE_HEAD)
    for column in ("shards", "weights", "activations up to", "answer", "whole head", "other", "total", ""):
        table.add_column(column, justify="left" if not column else "right")
    for rank in found.teacher_memory:
        names = ("weights", "activations", "answer", "whole head", "reserved")
        cells = [_in(unit, rank.parts.get(name, 0.0)) for name in names]
        style = "bold" if rank.shards == found.shards else None
        table.add_row(str(rank.shards), *cells, _in(unit, rank.bytes), _verdict(rank.fits), style=style)
    return table


def wire_table(found: Forecast) -> Table | None:
    """None where nothing is sent."""
    if found.mode == "local":
        return None
    rate = found.workload.tokens / found.times.step_s
    table = Table(title="the teacher's answers, by teacher.payload", title_justify="left", box=SIMPLE_HEAD)
    for column in ("payload", "bytes per token", "GiB per billion tokens", "Gbit/s at this speed"):
        table.add_column(column, justify="left" if column == "payload" else "right")
    for payload, count in found.wire_bytes_per_token.items():
        style = "bold" if payload == found.payload else None
        table.add_row(payload, f"{count:,}", f"{count * 1e9 / 2**30:,.0f}", f"{count * rate * 8e-9:,.3g}", style=style)
    if found.object_store_bytes:
        table.caption = f"object stores of all nodes together: at least {found.object_store_bytes / 2**20:,.0f} MiB"
    return table


def time_table(found: Forecast) -> Table:
    times, workload, flops = found.times, found.workload, found.flops
    table = Table(title="time", title_justify="left", box=SIMPLE_HEAD, show_header=False)
    again = f"{_si(flops.recompute)} recomputed + " if flops.recompute else ""
    table.add_row("operations per token", f"teacher {_si(flops.teacher)}")
    table.add_row("", f"student {_si(flops.forward)} forward + {_si(flops.backward)} backward")
    table.add_row("", f"      + {again}{_si(flops.loss)} loss")
    table.add_row("one optimizer step", f"{workload.tokens:,} tokens in {_seconds(times.step_s)}")
    table.add_row("", f"{workload.tokens / times.step_s:,.0f} tokens/s; {_limit(times.bottleneck)}")
    table.add_row(
        "student",
        f"{_seconds(times.student_s)}, of which loss {_seconds(times.loss_s)}, optimizer {_seconds(times.optimizer_s)}",
    )
    if found.mode == "pool":
        table.add_row(
            "teacher",
            f"{_seconds(times.teacher_s)} on one replica of {found.shards} shard(s); replicas that hide it: "
            f"{times.balanced_replicas}, planned: {times.replicas}",
        )
    elif found.mode == "local":
        table.add_row("teacher", f"{_seconds(times.teacher_s)} in each student worker, before its own work")
    else:
        table.add_row("teacher", "none: all answers are in the cache")
    unit = "CPU cores" if found.hardware.is_cpu else "GPUs"
    table.add_row("", f"{found.processors:g} {unit}")
    for each in (found.per_billion, found.whole):
        if each is not None:
            table.add_row(f"{each.tokens:,.0f} tokens", _cost_cells(each, unit))
    return table


def calibration_table(found: Forecast) -> Table | None:
    """None unless something was measured."""
    if found.calibration is None:
        return None
    each = found.calibration
    table = Table(title="assumed and measured", title_justify="left", box=SIMPLE_HEAD)
    for column in ("", "assumed", "measured", "measured / assumed"):
        table.add_column(column, justify="left" if not column else "right")
    for name, what in RATES.items():
        before, after = getattr(each.assumed, name), getattr(each.rates, name)
        if before or after:
            table.add_row(what, _seconds(before), _seconds(after), f"{after / before:.2f}" if before else "-")
    table.add_row("scatter of a worker's steps", f"{each.assumed.noise:.0%}", f"{each.rates.noise:.0%}", "")
    for what, planned, bytes_found in (
        ("student worker, resident", each.worker_planned, each.worker_bytes),
        ("teacher process, resident", each.replica_planned, each.replica_bytes),
    ):
        if bytes_found is not None:
            table.add_row(what, gib(planned), gib(bytes_found), f"{bytes_found / planned:.2f}")
    replicas = f" and {each.replicas} replica(s)" if each.replicas else ""
    table.caption = f"measured on {each.workers} worker(s){replicas}, steps of {_seconds(each.step_s)}"
    return table


def scaling_table(found: Forecast) -> Table:
    table = Table(title="simulated, by workers", title_justify="left", box=SIMPLE_HEAD)
    for column in ("workers", "replicas", "tokens/s", "efficiency", "waits for"):
        table.add_column(column, justify="left" if column == "waits for" else "right")
    for point in found.scaling:
        figures = (f"{point.workers:,}", f"{point.replicas:,}", f"{point.tokens_per_s:,.0f}", f"{point.efficiency:.0%}")
        table.add_row(*figures, WAITS.get(point.waits_for, point.waits_for))
    rates = "measured" if found.rates.measured else "assumed"
    table.caption = (
        f"{rates} rates; {found.workload.worker_rows} rows of each worker, so the batch grows; links "
        f"of {_si(found.hardware.link, 'B/s')} and collectives of {_si(found.hardware.collective, 'B/s')} assumed"
    )
    return table


def _limit(bottleneck: str) -> str:
    if bottleneck in ("student", "teacher"):
        return f"the {bottleneck} is the bottleneck"
    return f"it waits for {WAITS.get(bottleneck, bottleneck)}"


def _cost_cells(each: CostEstimate, unit: str) -> str:
    cost = "" if each.cost is None else f", cost {each.cost:,.2f}"
    return f"{_seconds(each.hours * 3600)}, {each.processor_hours:,.3g} hours of {unit}{cost}"


def _verdict(fits: bool) -> str:
    return "fits" if fits else "[red]too large[/red]"


def _unit(largest: float) -> str:
    return "GiB" if largest >= 8 * 2**30 else "MiB"


def _in(unit: str, count: float) -> str:
    return f"{count / 2**30:,.1f}" if unit == "GiB" else f"{count / 2**20:,.1f}"


def _seconds(seconds: float) -> str:
    if seconds >= 2 * 86400:
        return f"{seconds / 86400:,.1f} days"
    if seconds >= 2 * 3600:
        return f"{seconds / 3600:.1f} hours"
    if seconds >= 120:
        return f"{seconds / 60:.1f} minutes"
    return f"{seconds:.3g} s" if seconds >= 0.1 else f"{seconds * 1e3:.3g} ms"


def _si(value: float, unit: str = "") -> str:
    """With a decimal prefix: `1.54 G`, `80 GB`."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()
