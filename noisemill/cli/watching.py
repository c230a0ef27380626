"""Follow a job on the terminal to its end."""

import typer

from noisemill.client import Client
from noisemill.terminal import JobProgress, say, show_json
from shared.wire import EventView, JobView


def watch(client: Client, job: JobView, *, quiet: bool = False, print_events: bool = False) -> JobView:
    """Show progress until ``job`` has succeeded; an interrupt ends the watching, not the job.

    Raises:
        JobFailed, JobCanceled: it ended without a result.
    """
    with JobProgress(job, quiet=quiet) as progress:

        def on_event(event: EventView) -> None:
            progress.on_event(event)
            if print_events:
                show_json(event, on_one_line=True)

        try:
            return client.wait(job.id, on_event=on_event)
        except KeyboardInterrupt:
            pass  # the sentence below belongs under the bar, not into it
    say(
        f"{job.id} goes on. Follow it with `noisemill jobs watch {job.id}`, "
        f"stop it with `noisemill jobs cancel {job.id}`."
    )
    raise typer.Exit(130)
