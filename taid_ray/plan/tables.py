"""Tables of a Forecast for a terminal."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from taid_ray.plan.forecast import Forecast
from taid_ray.plan.from_run import replicas_of
from taid_ray.plan.notes import RATE_NAMES, planned_rates
from taid_ray.plan.process_memory import WorkerMemory
from taid_ray.plan.time import CostEstimate
from taid_ray.report.format import print_line

WAITS = {
    "data": "reading the data",
    "others": "the slowest worker",
    "schedule": "the scheduler",
    "teacher": "the teacher",
    "student": "nothing but the student",
}
"""Values of SimulatedStep.waits_for in words; `collectives` is its own."""


def show(found: Forecast, console: Console) -> None:
    """Prints all tables, at most 100 columns wide."""
    unit = found.inputs.hardware
    console.print(
        f"[bold]{found.inputs.config.name}[/bold] on {unit.name}{' cores' if unit.is_cpu else ''}: "
        f"{_si(unit.bfloat16_flops, 'FLOP/s')} bfloat16, {_si(unit.float32_flops, 'FLOP/s')} float32, "
        f"{_si(unit.memory_bytes, 'B')}, {_si(unit.bandwidth, 'B/s')}; assumed use {found.utilisation:.0%}",
        highlight=False,
    )
    tables = (
        models_table, images_table, worker_table, teacher_table, wire_table, rates_table, time_table, scaling_table
    )  # fmt: skip
    for table in tables:
        if (made := table(found)) is not None:
            console.print(made)
    for line in found.notes:
        print_line(console, f"note: {line}")


def models_table(found: Forecast) -> Table:
    """Shows the models' sizes."""
    student = found.inputs.student
    shapes = {"teacher": found.inputs.teacher} if found.inputs.config.teacher else {}
    table = Table(title="models", title_justify="left", box=SIMPLE_HEAD)
    for column in ("", "parameters", "trained", "hidden size", "head rows"):
        table.add_column(column, justify="left" if not column else "right")
    for name, shape in (shapes | {"student": student}).items():
        trained = _si(shape.trained) if shape is student else "-"
        table.add_row(name, _si(shape.parameters), trained, f"{shape.hidden_size:,}", f"{shape.head_rows:,}")
    return table


def images_table(found: Forecast) -> Table | None:
    """Shows what the images of a row become; None in a run without images."""
    inputs, images = found.inputs, found.inputs.images
    if images is None:
        return None
    size = f"{images.width}x{images.height}"
    table = Table(title="images", title_justify="left", box=SIMPLE_HEAD, show_header=False)
    tokens = f"{images.per_row} of {size}, {images.tokens:,} of its {inputs.workload.length:,} tokens each"
    table.add_row("one row", tokens)
    for name, pixels in (("student", images.student), ("teacher", images.teacher)):
        if pixels is not None:
            took = f"processed in {_seconds(pixels.seconds)} here, in one thread"
            table.add_row(f"at the {name}", f"{pixels.patches:,} patches, {took}")
    table.add_row("files", f"{_si(images.file_bytes, 'B')} each assumed, {_si(inputs.image_bytes, 'B')} a micro-batch")
    if inputs.mode == "pool" and inputs.asks_teacher:
        in_flight = _si(inputs.images_in_flight_bytes, "B")
        table.add_row("on the wire", f"the files as they are, up to {in_flight} of each worker in the object store")
    return table


def worker_table(found: Forecast) -> Table:
    """Shows the memory of a student worker by ZeRO stage."""
    unit = _unit(max(memory.bytes for memory in found.worker_memory))
    table = Table(
        title=f"one of {found.inputs.workers} student worker(s), {unit} at its fullest moment",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    columns = ("ZeRO", "ckpt", "moment", "weights", "optim", "grads", "activ", "loss", "teacher", "other", "total")
    for column in (*columns, ""):
        table.add_column(column, justify="left" if column in ("ckpt", "moment", "") else "right")
    for memory in found.worker_memory:
        table.add_row(*_worker_row(memory, unit), style="bold" if memory is found.configured else None)
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
    """Shows the memory of a teacher's process by shards; None unless the teacher has processes of its own."""
    if not found.shard_memory:
        return None
    unit = _unit(max(memory.bytes for memory in found.shard_memory))
    table = Table(title=f"one teacher process, {unit}", title_justify="left", box=SIMPLE_HEAD)
    for column in ("shards", "weights", "activations up to", "answer", "whole head", "other", "total", ""):
        table.add_column(column, justify="left" if not column else "right")
    for memory in found.shard_memory:
        names = ("weights", "activations", "answer", "whole head", "reserved")
        cells = [_in(unit, memory.parts.get(name, 0.0)) for name in names]
        style = "bold" if memory.shards == found.inputs.config.given_teacher.shards else None
        table.add_row(str(memory.shards), *cells, _in(unit, memory.bytes), _verdict(memory.fits), style=style)
    return table


def wire_table(found: Forecast) -> Table | None:
    """Shows the size of the teacher's answers by payload; None where training is sent none."""
    if found.inputs.mode == "local" or not found.inputs.asks_teacher:
        return None
    table = Table(title="the teacher's answers, by teacher.payload", title_justify="left", box=SIMPLE_HEAD)
    for column in ("payload", "bytes per token", "GiB per billion tokens", "Gbit/s at this speed"):
        table.add_column(column, justify="left" if column == "payload" else "right")
    for payload, count in found.inputs.wire_bytes.items():
        style = "bold" if payload == found.inputs.config.given_teacher.payload else None
        table.add_row(
            payload,
            f"{count:,}",
            f"{count * 1e9 / 2**30:,.0f}",
            f"{count * found.tokens_per_s * 8e-9:,.3g}",
            style=style,
        )
    if found.object_store_bytes:
        table.caption = f"object stores of all nodes together: at least {found.object_store_bytes / 2**20:,.0f} MiB"
    return table


def time_table(found: Forecast) -> Table:
    """Shows operations, times and cost."""
    inputs, times, flops = found.inputs, found.times, found.inputs.flops
    table = Table(title="time", title_justify="left", box=SIMPLE_HEAD, show_header=False)
    again = f"{_si(flops.recompute)} recomputed + " if flops.recompute else ""
    if inputs.asks_teacher:
        table.add_row("operations per token", f"teacher {_si(flops.teacher)}")
    heading = "" if inputs.asks_teacher else "operations per token"
    table.add_row(heading, f"student {_si(flops.forward)} forward + {_si(flops.backward)} backward")
    table.add_row("", f"      + {again}{_si(flops.loss)} loss")
    table.add_row("one optimizer step", f"{inputs.workload.tokens:,} tokens in {_seconds(times.step_s)}")
    table.add_row("", f"{found.tokens_per_s:,.0f} tokens/s; {_limit(times.bottleneck)}")
    table.add_row(
        "student",
        f"{_seconds(times.student_s)}, of which loss {_seconds(times.loss_s)}, optimizer {_seconds(times.optimizer_s)}",
    )
    table.add_row("teacher", _teacher_text(found))
    unit = "CPU cores" if inputs.hardware.is_cpu else "GPUs"
    table.add_row("", f"{found.processors:g} {unit}")
    for cost in (found.per_billion, found.whole):
        if cost is not None:
            table.add_row(f"{cost.tokens:,.0f} tokens", _cost_text(cost, unit))
    if (data := found.data) is not None:
        table.add_row(
            "before the first step",
            f"{_si(data.tokens)} tokens of documents are encoded in {_seconds(data.seconds)} on {data.cpus:g} CPU(s), once",
        )
        table.add_row("", f"and take {_si(data.store_bytes, 'B')}, with an index of {_si(data.index_bytes, 'B')}")
    return table


def _teacher_text(found: Forecast) -> str:
    """Says what the teacher does in a step."""
    inputs, times, teacher = found.inputs, found.times, found.inputs.config.teacher
    if teacher is None:
        return "none"
    if not inputs.asks_teacher:
        return "asked in validations only"
    if inputs.mode == "pool":
        return (
            f"{_seconds(times.teacher_s)} on one replica of {teacher.shards} shard(s); replicas that hide it: "
            f"{times.balanced_replicas}, planned: {times.replicas}"
        )
    if inputs.mode == "local":
        return f"{_seconds(times.teacher_s)} in each student worker, before its own work"
    return "none: all answers are in the cache"


def rates_table(found: Forecast) -> Table | None:
    """Shows the assumed rates beside those of a run, in the layout of the plan; None without --from."""
    if found.run is None or found.replayed_s is None:
        return None
    run = found.run
    table = Table(title="rates: assumed, and from the run", title_justify="left", box=SIMPLE_HEAD)
    for column in ("", "assumed", "from the run", "run / assumed"):
        table.add_column(column, justify="left" if not column else "right")
    for name in planned_rates(found):
        words = RATE_NAMES[name]
        before, after = getattr(found.assumed, name), getattr(found.rates, name)
        if name not in run.rates:
            table.add_row(words, _seconds(before), "-", "stays assumed")
        else:
            table.add_row(words, _seconds(before), _seconds(after), f"{after / before:.2f}" if before else "-")
    table.add_row("scatter of a worker's steps", f"{found.assumed.noise:.0%}", f"{found.rates.noise:.0%}", "")
    waiting = f"waiting for the teacher {_seconds(run.teacher_wait_s)}, " if found.inputs.asks_teacher else "waiting "
    table.caption = (
        f"the run: {run.inputs.workers} worker(s), teacher: {replicas_of(run.inputs)}; its steps took {_seconds(run.step_s)} "
        f"({waiting}for the scheduler {_seconds(run.schedule_wait_s)}); these rates "
        f"give {_seconds(found.replayed_s)} for its own layout"
    )
    return table


def scaling_table(found: Forecast) -> Table:
    """Shows what the simulation says of 1 to 4,096 workers."""
    hardware, rows = found.inputs.hardware, found.inputs.workload.worker_rows
    table = Table(title="simulated, by workers", title_justify="left", box=SIMPLE_HEAD)
    for column in ("workers", "replicas", "tokens/s", "efficiency", "scheduler busy", "waits for"):
        table.add_column(column, justify="left" if column == "waits for" else "right")
    for point in found.scaling:
        figures = (f"{point.workers:,}", f"{point.replicas:,}", f"{point.tokens_per_s:,.0f}", f"{point.efficiency:.0%}")
        table.add_row(*figures, f"{point.scheduler_share:.1%}", WAITS.get(point.waits_for, point.waits_for))
    table.caption = (
        f"{'rates of the run' if found.run else 'assumed rates'}; {rows} rows of each worker, so the batch grows; links "
        f"of {_si(hardware.link, 'B/s')} and collectives of {_si(hardware.collective, 'B/s')} assumed"
    )
    return table


def _limit(bottleneck: str) -> str:
    if bottleneck in ("student", "teacher"):
        return f"the {bottleneck} is the bottleneck"
    return f"it waits for {WAITS.get(bottleneck, bottleneck)}"


def _cost_text(estimate: CostEstimate, unit: str) -> str:
    cost = "" if estimate.cost is None else f", cost {estimate.cost:,.2f}"
    return f"{_seconds(estimate.hours * 3600)}, {estimate.processor_hours:,.3g} hours of {unit}{cost}"


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
    """Returns a value with a decimal prefix: `1.54 G`, `80 GB`."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()
