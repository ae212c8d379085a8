"""All commands, and how they fail: one line on standard error and exit code 2."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from nino.errors import NinoError
from nino.numbers import counted, every

INTERRUPTED = 130
"""Exit status."""
app = typer.Typer(
    help="Nowcast the weights of a training neural network: train in fewer steps.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
Folder = Annotated[Path, typer.Option("--out", help="Folder for the results.")]
Nowcaster = Annotated[str, typer.Option(help="A shipped name, a folder, a published .pt file or a hub id.")]
Predictor = Annotated[str, typer.Option("--nowcaster", help="confirmed, straight, or as elsewhere a nowcaster.")]
Own = Annotated[str, typer.Argument(metavar="MODULE:NAME", help="In your code, such as my_project.models:build.")]
Shape = Annotated[str, typer.Argument(metavar="MODEL", help="MODULE:FUNCTION, a config.json or its folder.")]


@app.command(epilog="Example: nino demo --steps 2000")
def demo(
    out: Folder = Path("runs/demo-digits"),
    steps: Annotated[int, typer.Option(min=100, help="Optimizer steps of each training.")] = 1500,
    seeds: Annotated[int, typer.Option(min=1, help="How many trainings of each method.")] = 3,
) -> None:
    """Train a small network with and without nowcasting: a table and a picture, in a minute or two."""
    from nino.demo import demo_task

    _compare(demo_task(), [], steps, seeds, 1e-2, out)


@app.command(epilog="Example: nino check my_project.models:build")
def check(model: Own) -> None:
    """Prove the wiring of a model: MODULE:NAME is a function that returns (model, example_inputs)."""
    from nino.cli.loading import load_model
    from nino.graph.check import check_wiring

    report = check_wiring(*load_model(model))
    typer.echo(str(report))
    raise typer.Exit(0 if report.ok else 1)


@app.command(epilog="Example: nino graph my_project.models:build --out pictures")
def graph(
    model: Shape,
    out: Folder = Path("runs/graph"),
    layers: Annotated[int | None, typer.Option(min=1, help="Of a config, whose layers are alike: so many.")] = None,
) -> None:
    """Draw the graph of a model, and write it as JSON; no weights are made, so any size works."""
    from nino.cli.loading import load_shape
    from nino.graph.pictures import draw_graph, title_of

    name, _, wired = load_shape(model, layers)
    title = title_of(name, wired)
    _make(out)
    draw_graph(wired, out, title)
    typer.echo(f"{title}\nlayers.png, adjacency.png and graph.json are in {out}/")


@app.command(epilog="Example: nino nowcast output/ --out output/checkpoint-6000-nowcast")
def nowcast(
    checkpoints: Annotated[list[Path], typer.Argument(help="Oldest first, or one output folder of the Trainer.")],
    out: Annotated[Path, typer.Option(help="The new checkpoint; must not exist.")],
    nowcaster: Annotated[
        str | None, typer.Option(help="As elsewhere, or straight, adapters, ...; nino-base, of adapters adapters.")
    ] = None,
    horizon: Annotated[int | None, typer.Option(min=1, help="Intervals between checkpoints ahead.")] = None,
    model: Annotated[str | None, typer.Option(help="MODULE:FUNCTION, where there is no config.json.")] = None,
    config: Annotated[Path | None, typer.Option(help="Folder of the config.json, if it lies elsewhere.")] = None,
    graph: Annotated[Path | None, typer.Option(help="graph.json of this model, such as of a recorded run.")] = None,
    preserve_norms: Annotated[bool, typer.Option(help="Matrices keep their norms.")] = False,
    dtype: Annotated[str, typer.Option(help="In which the nowcaster computes: float32 or bfloat16.")] = "float32",
    device: Annotated[str, typer.Option(help="Where it computes: cpu or cuda.")] = "cpu",
    memory_budget: Annotated[str | None, typer.Option(help="What computing may take, such as 2GB.")] = None,
) -> None:
    """Nowcast the checkpoints of a run: writes one from which training goes on."""
    from nino.checkpoints import nowcast_checkpoints
    from nino.cli.loading import load_network, read_graph
    from nino.cli.values import read_bytes, read_device, read_dtype
    from nino.predict.registry import load_predictor

    with _ended_by_an_interrupt(f"{out} was not written"), _bar() as progress:
        result = nowcast_checkpoints(
            checkpoints,
            out,
            None if nowcaster is None else load_predictor(nowcaster),
            horizon,
            model=load_network(model, config),
            graph=None if graph is None else read_graph(graph),
            dtype=read_dtype(dtype),
            device=read_device(device),
            memory_budget=None if memory_budget is None else read_bytes(memory_budget),
            preserve_norms=preserve_norms,
            progress=progress,
        )
    typer.echo(f"{result}\n{out} is the new checkpoint; resume training from it")


@app.command(epilog="Example: nino record my_project.task:MyTask --out trajectories/first --steps 5000")
def record(
    task: Own,
    out: Annotated[Path, typer.Option(help="Folder of the recording.")],
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 5000,
    interval: Annotated[int, typer.Option(min=1, help="Steps between recorded states.")] = 25,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Of weights and batches.")] = 0,
) -> None:
    """Train a task of yours (nino.evaluation.Task) with AdamW, and record its weights; the same command goes on."""
    from nino.cli.loading import load_task, raised
    from nino.cli.recording import record_task

    made = load_task(task, ("model", "batches", "loss"))
    try:
        problem = record_task(made, out, steps, interval, learning_rate, seed)
    except (NinoError, OSError):
        raise
    except Exception as error:  # whatever a person's code may raise
        raise raised(task, error) from error
    typer.echo(problem or f"{counted(steps, 'step')} recorded in {out}/")


@app.command(epilog="Example: nino pretrain trajectories --out my-nowcaster --steps 5000")
def pretrain(
    runs: Annotated[Path, typer.Argument(help="Folder of recordings.")],
    out: Annotated[Path, typer.Option(help="Folder for the nowcaster.")],
    steps: Annotated[int, typer.Option(min=1, help="Steps of the nowcaster.")] = 5000,
    hidden: Annotated[int, typer.Option(min=8, help="Width of the network.")] = 64,
    start_from: Annotated[str | None, typer.Option(help="Train this nowcaster further.")] = None,
) -> None:
    """Train a nowcaster on recordings; the same command goes on with one that was stopped."""
    from nino.data import Trajectory
    from nino.data.split import find_runs
    from nino.predict.model import NowcasterConfig
    from nino.predict.nowcaster import Nowcaster as Loaded
    from nino.pretraining.config import PretrainingConfig
    from nino.pretraining.loop import pretrain as train
    from nino.pretraining.windows import WindowSource

    split = find_runs(runs)
    split.check(runs)
    start = None if start_from is None else Loaded.from_pretrained(start_from)
    config = NowcasterConfig(hidden=hidden, inputs="movements") if start is None else start.config
    sources = [
        WindowSource([Trajectory(folder) for folder in folders], config, [2, 4, 8])
        for folders in (split.train, split.held_out)
    ]
    _make(out)
    train(PretrainingConfig(steps=steps), config, sources[0], sources[1], out, start)
    typer.echo(f"{out}/ holds a nowcaster: NowcastOptimizer(..., {str(out)!r})")


@app.command(epilog="Example: nino compare my_project.task:MyTask --steps 4000 --method adam --method nino:confirmed")
def compare(
    task: Own,
    steps: Annotated[int, typer.Option(min=20, help="Optimizer steps of each training.")],
    method: Annotated[list[str] | None, typer.Option(help="adam, own, nino:NAME, ema:0.99, snoo, linear, ...")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many trainings of each method.")] = 3,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW: its best one, please.")] = 1e-3,
    out: Folder = Path("runs/compare"),
) -> None:
    """Train a task of yours (nino.evaluation.Task) with and without nowcasting; the same command goes on."""
    from nino.cli.loading import load_task

    _compare(load_task(task), method or [], steps, seeds, learning_rate, out)


@app.command(epilog="Example: nino estimate config.json --period 500 --set snapshots_on=disk")
def estimate(
    model: Shape,
    nowcaster: Predictor = "confirmed",
    period: Annotated[int | None, typer.Option(help="Steps between nowcasts.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Steps of the run.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Of the plan: ramp=20; may be repeated.")] = None,
    world_size: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    fsdp: Annotated[bool, typer.Option(help="Parameters are sharded with FSDP2.")] = False,
    device: Annotated[str, typer.Option(help="That trains: cpu or cuda.")] = "cuda",
    dtype: Annotated[str | None, typer.Option(help="Of the parameters in training; by default the model's.")] = None,
    hidden: Annotated[int | None, typer.Option(min=1, help="Width of a nowcaster of your own, not of a name.")] = None,
) -> None:
    """Say how much memory nowcasting takes in a run, per process, of the one that holds the most."""
    from nino.cli.estimates import lines_of
    from nino.cli.loading import load_shape
    from nino.cli.values import read_dtype, read_plan
    from nino.costs import estimate_costs
    from nino.plan import Run, choose
    from nino.predict.model import NowcasterConfig
    from nino.predict.registry import load_predictor

    name, built, wired = load_shape(model)
    predictor = load_predictor(nowcaster) if hidden is None else NowcasterConfig(hidden=hidden)
    plan = choose(read_plan(settings or [], period), Run.of(predictor, max_steps))
    costs = estimate_costs(
        built,
        predictor,
        plan=plan,
        max_steps=max_steps,
        world_size=world_size,
        sharding="fsdp2" if fsdp else "none",
        device=device,  # type: ignore[arg-type]
        dtype=None if dtype is None else read_dtype(dtype),
        graph=wired,
    )
    size = f"{counted(costs.weights, 'weight')}, {counted(costs.nodes, 'neuron')}"
    typer.echo(f"{name}: {size}; a nowcast {every(plan.period or 1, 'step')}")
    typer.echo("\n".join(lines_of(costs, plan)))


@app.command(epilog="Example: nino plot output-without output-with --out both.png")
def plot(
    runs: Annotated[list[Path], typer.Argument(help="Folders of a Trainer, TensorBoard, wandb, a comparison.")],
    out: Annotated[Path, typer.Option(help="A picture.")] = Path("run.png"),
) -> None:
    """Draw the training loss of a run, or of several in one picture, with their jumps marked."""
    from nino.plots import plot_run

    out = out if out.suffix else out.with_suffix(".png")
    plot_run(runs, out)
    typer.echo(str(out))


@app.command()
def weights() -> None:
    """List the nowcasters that are installed."""
    from nino.predict.files import shipped_nowcasters
    from nino.predict.nowcaster import Nowcaster as Loaded

    for name in shipped_nowcasters():
        config = Loaded.from_pretrained(name).config
        typer.echo(f"{name:<12} {config.kind}, {config.hidden} wide, reads {config.context} {config.inputs}")


def main() -> NoReturn:
    """Run the command line; whatever a person can cause is one line."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("nino").setLevel(logging.INFO)
    command: Any = typer.main.get_command(app)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # asked to end: as by Ctrl-C
    try:
        code = command.main(standalone_mode=False)
    except NinoError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename or 'a file'}: {error.strerror or error}")
    except ModuleNotFoundError as error:
        _fail(f"this command needs a package that is not installed: pip install {str(error.name).split('.')[0]}")
    except ImportError as error:
        _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        if not hasattr(error, "format_message"):  # a wrong option, a missing argument
            raise
        _fail(error.format_message())
    finally:
        signal.signal(signal.SIGTERM, before)
    if code == INTERRUPTED:
        _fail("interrupted; what was done is kept", INTERRUPTED)
    raise SystemExit(code if isinstance(code, int) else 0)


@contextmanager
def _ended_by_an_interrupt(consequence: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        _fail(f"interrupted; {consequence}", INTERRUPTED)


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None] | None]:
    """Shows a person how far something is, when called with the work done and the total."""
    if not sys.stderr.isatty():
        yield None
        return
    with typer.progressbar(length=100, file=sys.stderr) as bar:
        yield lambda done, total: bar.update(100 * done // total - bar.pos)


def _fail(message: str, code: int = 2) -> NoReturn:
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    sys.exit(code)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NinoError(f"{folder} cannot be made a folder: {error.strerror}; give another --out") from error


def _compare(task: Any, methods: list[str], steps: int, seeds: int, learning_rate: float, out: Path) -> None:
    from nino.evaluation import compare as run

    _make(out)
    chosen = methods or ["adam", "nino:confirmed"]
    result = run(
        task,
        chosen,
        seeds=range(seeds),
        budgets=[steps],
        folder=out,
        learning_rates=[learning_rate],
        schedules=["cosine"],
        warmup=min(100, steps // 10),
    )
    for cell, reason in result.failed.items():
        typer.echo(f"{cell.label} failed: {' '.join(reason.split())}", err=True)
    kept = [name for name in ("results.json", "table.md", "curves.png") if (out / name).exists()]
    typer.echo(f"{result}\n{out}/ holds {', '.join(kept)}")
    if result.results and "curves.png" not in kept:
        typer.echo("no curves were drawn: pip install 'nowcaster[eval]'", err=True)
    if result.failed:
        raise typer.Exit(1)
