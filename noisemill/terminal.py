"""What a person sees: tables and progress for people, JSON for programs. Results go to stdout, the rest to stderr."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any, Self

from pydantic import BaseModel
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from shared.wire import EventView, JobView

_WIDE = 250
_STATE_COLORS = {
    **dict.fromkeys(("succeeded", "ready"), "green"),
    **dict.fromkeys(("failed", "expired"), "red"),
    **dict.fromkeys(("canceled", "canceling", "paused", "pausing"), "yellow"),
    **dict.fromkeys(("running", "ingesting", "uploading"), "cyan"),
}


def _console(*, stderr: bool) -> Console:
    # Without a terminal nothing is wrapped or cut, so that identifiers can be read by programs.
    is_terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, highlight=False, width=None if is_terminal else _WIDE, soft_wrap=not is_terminal)


def say(text: str) -> None:
    """Tell a person something, on stderr."""
    _console(stderr=True).print(text, markup=False)


def complain(text: str) -> None:
    """Say what went wrong, on stderr."""
    _console(stderr=True).print(f"[bold red]Error:[/] {escape(text)}")


def show(text: str) -> None:
    """Print a result, on stdout."""
    _console(stderr=False).print(text, markup=False)


def show_json(value: BaseModel | Sequence[BaseModel] | Mapping[str, Any], *, on_one_line: bool = False) -> None:
    """Print a result for programs, on stdout."""
    indent = None if on_one_line else 2
    sys.stdout.write(json.dumps(_plain(value), indent=indent, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value


def show_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows; a first column of identifiers is never cut."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for place, column in enumerate(columns):
        table.add_column(column, no_wrap=place == 0, overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    _console(stderr=False).print(table)


def show_fields(fields: Mapping[str, object]) -> None:
    """Print one thing, a field a line; fields without a value are left out."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in fields.items():
        if value not in (None, "", {}, []):
            table.add_row(name, _cell(value))
    _console(stderr=False).print(table)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, datetime):
        return ago(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict | list):
        return escape(json.dumps(_plain(value), ensure_ascii=False))
    text = str(value)
    color = _STATE_COLORS.get(text)
    return f"[{color}]{text}[/]" if color else escape(text)


def ago(moment: datetime) -> str:
    """How long ago it was."""
    seconds = max(0.0, (datetime.now(UTC) - moment).total_seconds())
    return f"{duration(seconds)} ago"


def duration(seconds: float) -> str:
    """A length of time in one or two units."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{timedelta(seconds=whole).days} d"


def size(count: int) -> str:
    """A number of bytes in a readable unit."""
    amount = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"


class _Shown:
    """A bar that is there for the length of a ``with``."""

    _bar: Progress

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


class JobProgress(_Shown):
    """Shows a job's events: a bar on a terminal, a line now and then elsewhere, nothing if ``quiet``."""

    def __init__(self, job: JobView, *, quiet: bool = False) -> None:
        self._title = job.summary or job.id
        self._phase: str = job.state
        self._said = ""
        self._tenth = 0
        self._quiet = quiet
        console = _console(stderr=True)
        self._live = console.is_terminal and not quiet
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[figures]}"))
        self._bar = Progress(*columns, console=console, transient=True, disable=not self._live)
        self._task = self._bar.add_task(self._description(), total=None, figures="")

    def on_event(self, event: EventView) -> None:
        """Show what an event tells."""
        data = event.data
        match event.type:
            case "job.state":
                self._enter_phase(data.get("state", ""))
                self._tenth = 0
            case "job.progress":
                self._enter_phase(data.get("phase") or self._phase)
                self._advance(data)
            case "job.log":
                self._note(str(data.get("message", "")))
            case "job.metric" if data.get("split") == "held_out":
                self._note(f"held out at step {data.get('step')}: {_metrics(data)}")
            case _:
                pass

    def _enter_phase(self, phase: str) -> None:
        if phase and phase != self._phase:
            self._phase = phase
            self._bar.update(self._task, description=self._description())
            self._line("")

    def _advance(self, data: Mapping[str, Any]) -> None:
        step, steps = data.get("step") or 0, data.get("steps") or 0
        if not steps:
            return
        figures = f"{step}/{steps}{_figures(data)}"
        self._bar.update(self._task, completed=step, total=steps, figures=figures)
        if (tenth := 10 * step // steps) != self._tenth:
            self._tenth = tenth
            self._line(f" {figures}")

    def _line(self, rest: str) -> None:
        text = f"{self._title}: {self._phase.replace('_', ' ')}{rest}"
        if not self._live and not self._quiet and text != self._said:
            self._said = text
            say(text)

    def _note(self, text: str) -> None:
        if self._live:
            self._bar.console.print(f"  {text}", markup=False, style="dim")
        elif not self._quiet:
            say(f"{self._title}: {text}")

    def _description(self) -> str:
        return f"[bold]{escape(self._title)}[/] {escape(self._phase.replace('_', ' '))}"


def _figures(data: Mapping[str, Any]) -> str:
    parts: list[str] = []
    with suppress(TypeError, ValueError):  # figures are the worker's own; a strange one must not stop the watching
        if (loss := data.get("loss")) is not None:
            parts.append(f"loss {loss:.4g}")
        if (rate := data.get("rate")) is not None:
            parts.append(f"{rate:.3g} steps/s")
        if (eta := data.get("eta_seconds")) is not None:
            parts.append(f"{duration(eta)} left")
    return "".join(f", {part}" for part in parts)


def _metrics(data: Mapping[str, Any]) -> str:
    values = data.get("values", data)
    numbers = {
        name: value
        for name, value in values.items()
        if name not in ("step", "attempt") and isinstance(value, int | float)
    }
    return ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())


class TransferProgress(_Shown):
    """Shows bytes going through, on a terminal only."""

    def __init__(self, title: str, total: int, *, quiet: bool = False) -> None:
        console = _console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        self._bar = Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal)
        self._task = self._bar.add_task(escape(title), total=total or None)

    def on_bytes(self, count: int) -> None:
        self._bar.advance(self._task, count)
