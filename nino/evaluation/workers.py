"""Work in other processes, which end with this one: many long jobs on a few, or one job in a fresh one.

Of many, one that fails, or that takes its process with it, costs only itself.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, Literal, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")
Report = Callable[[int, str], None]
"""Called with an amount of progress, and what to say."""
Work = Callable[[Any, Report], Any]
"""Called in a worker process with a job, and a function to report progress with; what it returns is picklable."""


@dataclass(frozen=True)
class Event(Generic[Job]):
    """What happened to a job."""

    job: Job
    kind: Literal["progress", "done", "failed"]
    amount: int = 0
    text: str = ""
    """What a job in progress says, or why it failed."""
    result: Any = None
    """What the work returned for a job that is done."""


def do_all(jobs: Sequence[Job], work: Work, processes: int) -> Iterator[Event[Job]]:
    """Do all jobs, several at once, in spawned processes, and tell what happens.

    Args:
        jobs: picklable.
        work: picklable.
        processes: at once.
    """
    waiting = deque(jobs)
    workers: dict[Connection, Worker] = {}
    try:
        while waiting or workers:
            while waiting and len(workers) < processes:
                worker = Worker(work)
                workers[worker.connection] = worker
                worker.begin(waiting.popleft())
            for connection in wait(list(workers)):
                worker = workers[connection]  # type: ignore[index]
                event = worker.receive()
                if event.kind == "progress":
                    yield event
                    continue
                if worker.is_alive and waiting:
                    worker.begin(waiting.popleft())
                else:
                    del workers[connection]  # type: ignore[arg-type]
                    worker.end()
                yield event
    finally:
        for worker in workers.values():
            worker.end()


def do_here(jobs: Sequence[Job], work: Work, listen: Callable[[Event[Job]], object]) -> None:
    """Do all jobs one after another in this process, and tell what happens."""
    for job in jobs:

        def report(amount: int, text: str, job: Job = job) -> None:
            listen(Event(job, "progress", amount, text))

        try:
            result = work(job, report)
        except Exception as error:  # one failed job must not lose the others
            listen(Event(job, "failed", text=reason_of(error)))
        else:
            listen(Event(job, "done", result=result))


def reason_of(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


class Worker:
    """A process that does one job after another."""

    def __init__(self, work: Work) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(work, theirs), daemon=True)
        self.process.start()
        theirs.close()  # so that the end of the process is the end of the connection
        self.job: Any = None
        self.is_alive = True

    def begin(self, job: Any) -> None:
        """Send a job; a process that has died meanwhile is noticed by :meth:`receive`."""
        self.job = job
        try:
            self.connection.send(job)
        except OSError:
            self.is_alive = False

    def receive(self) -> Event[Any]:
        """What the process has to tell."""
        try:
            return Event(self.job, *self.connection.recv())
        except (EOFError, OSError):
            self.is_alive = False
            self.process.join()
            reason = f"its process ended with code {self.process.exitcode}"
            hint = " (killed: out of memory?)" if self.process.exitcode == -signal.SIGKILL else ""
            return Event(self.job, "failed", 0, reason + hint)

    def end(self) -> None:
        """Stop the process, whatever it does."""
        self.connection.close()
        self.process.terminate()
        self.process.join()


def serve(work: Work, connection: Connection) -> None:
    """The worker's side: do what comes until nothing comes any more."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of an interrupt, the parent decides
    while True:
        try:
            job = connection.recv()
        except (EOFError, OSError):
            return
        try:
            result = work(job, lambda amount, text: connection.send(("progress", amount, text)))
            connection.send(("done", 0, "", result))
        except BrokenPipeError:  # the parent is gone
            return
        except Exception as error:  # one failed job must not lose the others
            connection.send(("failed", 0, reason_of(error)))


def in_fresh_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function in a process of its own, which ends with this one.

    Raises:
        BrokenProcessPool: if the process dies.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=end_with_parent) as fresh:
        return fresh.submit(function, *arguments).result()


def end_with_parent() -> None:
    """From now on, end this process as soon as the one that started it is gone, killed ones included."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_after, args=(parent.sentinel,), daemon=True).start()


def _exit_after(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
