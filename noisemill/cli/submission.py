"""``noisemill train``, ``generate``, ``evaluate``, ``reaverage``, ``export``, ``import``, ``reproduce``: submit a job,
follow it to its end."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from noisemill.cli.artifacts import fetch_all
from noisemill.cli.options import (
    AsJson,
    Labels,
    Model,
    Priority,
    SetFields,
    SpecFile,
    Wait,
    fields,
    pairs,
    read_json,
)
from noisemill.cli.watching import watch
from noisemill.client import Client
from noisemill.errors import InvalidInput
from noisemill.terminal import say, show, show_json
from shared.reproduction import Reproduction
from shared.specs import FAMILIES
from shared.specs.tasks import PictureField
from shared.wire import JobView

_ID = re.compile(r"(ds|art)_[0-9a-f]{32}")


def register(app: typer.Typer) -> None:
    """Add the commands to the root."""
    app.command()(train)
    app.command()(generate)
    app.command()(evaluate)
    app.command()(reaverage)
    app.command()(export)
    app.command("import")(import_model)
    app.command()(reproduce)


def train(  # noqa: PLR0913, PLR0917 - a parameter is an option
    family: Annotated[str | None, typer.Option("--family", help="Model family.", show_default="vae")] = None,
    dataset: Annotated[str | None, typer.Option("--dataset", help="Id, or name of the newest one so called.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="Name to register the result under.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Optimizer steps.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Samples per step.")] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", help="Peak learning rate.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Key of all randomness.")] = None,
    set_fields: SetFields = None,
    spec_file: SpecFile = None,
    labels: Labels = None,
    priority: Priority = None,
    wait: Wait = True,
    as_json: AsJson = False,
) -> None:
    """Train a model on a dataset and register it."""
    named = {
        "family": family,
        "dataset": dataset,
        "model": model,
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "seed": seed,
    }
    body = _job("train", spec_file, named, set_fields, labels, priority)
    body["spec"].setdefault("family", "vae")
    with Client() as client:
        kind = FAMILIES.get(body["spec"]["family"])
        for field in ("dataset", *(kind.further_datasets if kind else ())):
            _resolve_dataset(client, body["spec"], field)
        job, _ = _carry_out(client, body, wait=wait)
        _present(job, as_json=as_json)
        if wait and not as_json:
            ref = (job.result or {}).get("model", body["spec"].get("model"))
            say(f"Trained {ref}. Draw from it with `noisemill generate {ref} --out samples`.")


def generate(  # noqa: PLR0913, PLR0917 - a parameter is an option
    model: Model = None,
    num_samples: Annotated[int | None, typer.Option("--num-samples", help="How many samples.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Key of the noise.")] = None,
    task: Annotated[
        str | None, typer.Option("--task", help="What to do with the model.", show_default="generate")
    ] = None,
    set_fields: SetFields = None,
    spec_file: SpecFile = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder to download the samples to.")] = None,
    labels: Labels = None,
    priority: Priority = None,
    wait: Wait = True,
    as_json: AsJson = False,
) -> None:
    """Draw samples from a trained model."""
    if out is not None and not wait:
        raise typer.BadParameter("samples can be downloaded only after waiting for them", param_hint="--out")
    named = {"model": model, "num_samples": num_samples, "seed": seed, "task": task}
    body = _job("generate", spec_file, named, set_fields, labels, priority)
    body["spec"].setdefault("task", "generate")
    with Client() as client:
        job, files = _carry_out(client, body, wait=wait, out=out)
        _present(job, as_json=as_json, files=files)
        if wait and out is None and not as_json:
            say(f"Download the samples with `noisemill artifacts get {job.id} --out samples`.")


def evaluate(  # noqa: PLR0913, PLR0917 - a parameter is an option
    model: Model = None,
    dataset: Annotated[str | None, typer.Option("--dataset", help="Id, or name of the newest one so called.")] = None,
    num_samples: Annotated[int | None, typer.Option("--num-samples", help="How many samples to draw.")] = None,
    metrics: Annotated[list[str] | None, typer.Option("--metric", help="Measure only this; may be repeated.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Key of the noise.")] = None,
    set_fields: SetFields = None,
    spec_file: SpecFile = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to download the report and its pictures to.")
    ] = None,
    labels: Labels = None,
    priority: Priority = None,
    wait: Wait = True,
    as_json: AsJson = False,
) -> None:
    """Measure a trained model on a dataset."""
    if out is not None and not wait:
        raise typer.BadParameter("the report can be downloaded only after waiting for it", param_hint="--out")
    named = {"model": model, "dataset": dataset, "num_samples": num_samples, "metrics": metrics or None, "seed": seed}
    body = _job("evaluate", spec_file, named, set_fields, labels, priority)
    with Client() as client:
        job, files = _carry_out(client, body, wait=wait, out=out)
        if wait and not as_json:
            say("\n".join(_figures(job)))
        _present(job, as_json=as_json, files=files)


def reaverage(  # noqa: PLR0913, PLR0917 - a parameter is an option
    model: Model = None,
    ema_length: Annotated[
        float | None,
        typer.Option("--ema-length", help="Length of the average as a share of the training: 0.05 to 0.25."),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Name to register the result under.", show_default="the model's")
    ] = None,
    set_fields: SetFields = None,
    spec_file: SpecFile = None,
    labels: Labels = None,
    priority: Priority = None,
    wait: Wait = True,
    as_json: AsJson = False,
) -> None:
    """Average the weights of a model trained with ``ema=power`` over another length."""
    named = {"model": model, "ema_length": ema_length, "name": name}
    body = _job("reaverage", spec_file, named, set_fields, labels, priority)
    with Client() as client:
        job, _ = _carry_out(client, body, wait=wait)
        _present(job, as_json=as_json)
        if wait and not as_json:
            say(f"Registered {(job.result or {})['model']}.")


def export(  # noqa: PLR0913, PLR0917 - a parameter is an option
    model: Model = None,
    export_format: Annotated[
        str | None, typer.Option("--format", help="Whose files they are.", show_default="diffusers")
    ] = None,
    set_fields: SetFields = None,
    spec_file: SpecFile = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder to download the files to.")] = None,
    labels: Labels = None,
    priority: Priority = None,
    wait: Wait = True,
    as_json: AsJson = False,
) -> None:
    """Write a trained model as files that another library opens, with a model card."""
    if out is not None and not wait:
        raise typer.BadParameter("files can be downloaded only after waiting for them", param_hint="--out")
    body = _job("export", spec_file, {"model": model, "format": export_format}, set_fields, labels, priority)
    with Client() as client:
        job, files = _carry_out(client, body, wait=wait, out=out)
        _present(job, as_json=as_json, files=files)
        if wait and out is None and not as_json:
            say(f"Download the files with `noisemill artifacts get {job.id} --out model`.")


def import_model(  # noqa: PLR0913, PLR0917 - a parameter is an option
    source: Annotated[
        str, typer.Argument(metavar="PATH", help="Folder of diffusers, a zip or tar of one, or the dataset it became.")
    ],
    model: Annotated[str | None, typer.Option("--model", help="Name to register it under.")] = None,
    objective: Annotated[
        str | None, typer.Option("--objective", help="What the network predicts; by its scheduler when left out.")
    ] = None,
    num_classes: Annotated[int | None, typer.Option("--num-classes", help="Classes that it knows, if any.")] = None,
    set_fields: SetFields = None,
    spec_file: SpecFile = None,
    labels: Labels = None,
    priority: Priority = None,
    wait: Wait = True,
    as_json: AsJson = False,
) -> None:
    """Register a model that another library has written."""
    named = {"dataset": source, "model": model, "objective": objective, "num_classes": num_classes}
    body = _job("import", spec_file, named, set_fields, labels, priority)
    with Client() as client:
        if (path := Path(source)).exists():
            uploaded = client.upload_dataset(path, modality="model")
            say(f"Uploaded {uploaded.id}.")
            body["spec"]["dataset"] = client.wait_dataset(uploaded.id).id
        job, _ = _carry_out(client, body, wait=wait)
        _present(job, as_json=as_json)
        if wait and not as_json:
            ref = (job.result or {})["model"]
            say(f"Registered {ref}. Draw from it with `noisemill generate {ref} --out samples`.")


def reproduce(
    job_id: Annotated[str, typer.Argument(metavar="JOB", help="Id of a job that succeeded.")],
    wait: Wait = True,
    as_json: AsJson = False,
) -> None:
    """Do again what a job did, and compare the bytes; exits with 1 if they are not the same."""
    with Client() as client:
        job = client.reproduce(job_id)
        say(f"Submitted {job.id}.")
        if job.reproduces and job.reproduces.reproducibility == "none":
            say("The first job says of itself that its bytes cannot be had again.")
        job = watch(client, job) if wait else job
    _present(job, as_json=as_json)
    if wait:
        found = Reproduction.model_validate((job.result or {})["reproduction"])
        say(_verdict(found))
        raise typer.Exit(0 if found.identical else 1)


def _verdict(found: Reproduction) -> str:
    """Whether it made the same bytes, and what may be why it did not."""
    if found.identical:
        return f"Identical to {found.of}: {found.expected_sha256}."
    lines = [f"Not identical to {found.of}: expected {found.expected_sha256}, found {found.found_sha256}."]
    lines += [f"  {name}: {one.expected} then, {one.found} now" for name, one in found.differing.items()]
    if found.same_fingerprint:
        lines.append("Nothing that is recorded of the two runs differs.")
    return "\n".join(lines)


def _figures(job: JobView) -> list[str]:
    """One line per figure, with its interval."""
    lines: list[str] = []
    for name, figure in (job.result or {}).get("figures", {}).items():
        low, high = ("?" if bound is None else f"{bound:.4g}" for bound in figure["confidence_95"])
        lines.append(f"{name:20} {figure['value']:.4g}  ({low} to {high}, {figure['num_samples']} samples)")
    return lines


def _job(
    kind: str,
    spec_file: Path | None,
    named: Mapping[str, Any],
    set_fields: list[str] | None,
    labels: list[str] | None,
    priority: str | None,
) -> dict[str, Any]:
    """The body of the request: the file, overridden by named options, overridden by ``--set``."""
    content = read_json(spec_file)
    body: dict[str, Any] = content if isinstance(content.get("spec"), dict) else {"spec": content}
    if body.setdefault("type", kind) != kind:
        raise typer.BadParameter(f"the file holds a {body['type']} job, not a {kind} job", param_hint="--file")
    given = {name: value for name, value in named.items() if value is not None}
    body["spec"] = {**body["spec"], **given, **fields(set_fields)}
    if labels:
        body["labels"] = {**body.get("labels", {}), **pairs(labels, "--label")}
    if priority:
        body["priority"] = priority
    return body


def _carry_out(
    client: Client, body: dict[str, Any], *, wait: bool, out: Path | None = None
) -> tuple[JobView, list[Path]]:
    """Submit it and, where that is wanted, follow it to its end and download what it made."""
    for field in ("dataset", *get_args(PictureField)):
        _resolve_dataset(client, body["spec"], field)
    job = client.submit(body)
    say(f"Submitted {job.id}.")
    job = watch(client, job) if wait else job
    return job, [] if out is None else fetch_all(client, job.id, out)


def _resolve_dataset(client: Client, spec: dict[str, Any], field: str) -> None:
    name = spec.get(field)
    if not isinstance(name, str) or _ID.fullmatch(name):
        return
    found = next((dataset for dataset in client.datasets() if dataset.name == name), None)
    if found is None:
        raise InvalidInput(f"There is no dataset named {name!r}: `noisemill datasets list` shows what there is.")
    spec[field] = found.id


def _present(job: JobView, *, as_json: bool, files: list[Path] | None = None) -> None:
    if as_json:
        shown = job.model_dump(mode="json")
        show_json({**shown, "files": [str(file) for file in files]} if files else shown)
    elif files:
        say(f"{len(files)} files are in {files[0].parent}/.")
    else:
        show(job.id)
