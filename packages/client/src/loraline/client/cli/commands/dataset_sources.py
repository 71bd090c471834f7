"""`loraline datasets recipes|preview|probe`: look at what makes rows before paying for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer

from loraline.api.datagen.v1 import datagen_pb2
from loraline.client.cli.app import App, invocation
from loraline.client.cli.output import Output
from loraline.client.cli.plaindata import as_data
from loraline.client.errors import LoralineApiError
from loraline.client.pipeline.document import SpecError, read_yaml
from loraline.client.pipeline.protofill import fill

Words = Annotated[list[str] | None, typer.Option(help="Drawn for variety; give it several times.")]
KINDS = {"name", "convert", "template", "llm"}


def register(group: App) -> None:
    """Add the commands to the group `datasets`."""
    group.command("recipes")(recipes)
    group.command("preview")(preview)
    group.command("probe")(probe)


def recipes() -> None:
    """List the built-in recipes of language-model rows: what each makes, needs and takes.

    Examples:

      loraline datasets recipes
      loraline datasets recipes --format json        (with schemas and system prompts)
      loraline datasets preview commands --brief "Lamps and doors of a house." --rows 3
    """
    output = invocation().output
    with invocation().client() as client:
        found = client.datagen.recipes()
    if output.json:
        output.data(found)
        return
    for recipe in found:
        output.line(recipe.name, "bold")
        answers = "one JSON object" if recipe.answer_format == datagen_pb2.OUTPUT_FORMAT_JSON else "text"
        output.line(f"  {recipe.description}")
        output.line(f"  needs: {', '.join(recipe.requires) or 'nothing'}; takes: {', '.join(recipe.profits_from)}")
        output.line(f"  fields of an item: {', '.join(_fields(recipe))}; the answer is {answers}")


def _fields(recipe: datagen_pb2.Recipe) -> list[str]:
    schema = as_data(recipe.item_schema)
    return schema.get("required") or sorted(schema.get("properties", {}))  # a map on the wire keeps no order


def preview(  # noqa: PLR0913, PLR0917 (one argument for each option of the command)
    recipe: Annotated[str, typer.Argument(help="A recipe that `loraline datasets recipes` lists.")] = "",
    rows: Annotated[int, typer.Option(min=1, max=50, help="Rows to make.")] = 5,
    brief: Annotated[str, typer.Option(help="What the rows shall be about.")] = "",
    topic: Words = None,
    persona: Words = None,
    style: Words = None,
    example: Annotated[
        list[str] | None, typer.Option(metavar="QUESTION=>ANSWER", help="A pair to show; give it several times.")
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="File of text or HTML for the recipe extraction; several times.")
    ] = None,
    schema: Annotated[Path | None, typer.Option(help="File with the JSON schema of an item.")] = None,
    language: Annotated[str, typer.Option(help="Language of the rows: ko, zh or en.")] = "",
    endpoint: Annotated[str, typer.Option(help="Endpoint of the server; default: its LLM_BASE_URL.")] = "",
    model: Annotated[str, typer.Option(help="Model to ask; default: the endpoint's.")] = "",
    file: Annotated[
        Path | None, typer.Option(help="YAML with one entry of a pipeline's `sources`: convert, template or llm.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of every draw.")] = 0,
) -> None:
    """Make the first rows of a source and show them. Nothing is published; a model is asked for these rows only.

    Examples:

      loraline datasets preview commands --brief "Lamps and doors of a house." --rows 3
      loraline datasets preview recommendation --language ko --topic sleep --topic stress
      loraline datasets preview extraction --text page.html --schema contact.json
      loraline datasets preview evol-instruct --example "How is bread made?=>With time."
      loraline datasets preview --file source.yaml --format json
    """
    if bool(recipe) == (file is not None):
        raise _refused("PREVIEW_OF_WHAT", "Name a recipe (`loraline datasets recipes`), or a --file with a source.")
    request = datagen_pb2.PreviewDatasetRequest(rows=rows, seed=seed)
    if file is not None:
        request.source.CopyFrom(read_source(file))
    else:
        asked = request.source.llm
        asked.recipe, asked.rows, asked.brief, asked.language = recipe, 0 if text else rows, brief, language
        asked.topics.extend(topic or [])
        asked.personas.extend(persona or [])
        asked.styles.extend(style or [])
        asked.few_shots.extend(_example(pair) for pair in example or [])
        asked.texts.texts.extend(_content(path) for path in text or [])
        if not text:
            asked.ClearField("texts")
        if schema is not None:
            asked.item_schema.update(read_json(schema))
        if endpoint or model:
            asked.endpoints.add(name=endpoint, model=model)
    output = invocation().output
    with invocation().client() as client:
        made = client.datagen.preview(request).rows
    if output.json:
        output.data({"rows": list(made)})
    else:
        _show(output, [as_data(row) for row in made])


def _refused(reason: str, message: str) -> LoralineApiError:
    return LoralineApiError(grpc.StatusCode.INVALID_ARGUMENT, reason, message)


def _example(pair: str) -> datagen_pb2.FewShot:
    prompt, arrow, response = pair.partition("=>")
    if not (arrow and prompt.strip() and response.strip()):
        raise _refused("EXAMPLE_INVALID", f"--example {pair!r} is no pair. Write QUESTION=>ANSWER, in quotes.")
    return datagen_pb2.FewShot(prompt=prompt.strip(), response=response.strip())


def _content(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise _refused("UNREADABLE_FILE", f"{path} cannot be read as UTF-8 text: {error}.") from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; INVALID_ARGUMENT says what is wrong with it."""
    try:
        value = json.loads(_content(path))
    except ValueError as error:
        raise _refused("UNREADABLE_FILE", f"{path} is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise _refused("UNREADABLE_FILE", f"{path} holds no JSON object.")
    return value


def read_source(file: Path) -> datagen_pb2.DatasetSource:
    """Return the source that a YAML file describes; SpecError tells every mistake in it."""
    node, source = read_yaml(file), datagen_pb2.DatasetSource()
    fill(
        source, node, hints={"sources": "Give one of its entries only.", "source": "Name an artifact or a server path."}
    )
    if source.WhichOneof("source") is None and not node.problems:
        node.fault("needs one of `convert`, `template`, `llm`.")
    if node.problems:
        raise SpecError(file, node.problems)
    return source


def _show(output: Output, rows: list[dict[str, Any]]) -> None:
    for number, row in enumerate(rows, start=1):
        output.line(f"row {number}  {row['kind']}, {row['format']}, from {row['source']}", "bold")
        for message in row["messages"]:
            first, *rest = str(message["content"]).split("\n")
            output.line(f"  {message['role']}: {first}")
            for line in rest:
                output.line(f"    {line}")
    count = "1 row" if len(rows) == 1 else f"{len(rows)} rows"
    output.say(f"{count}; nothing was published")


def probe(
    endpoint: Annotated[str, typer.Argument(help="Endpoint of the server; default: its LLM_BASE_URL.")] = "",
    model: Annotated[str, typer.Option(help="Model that it must have; default: the endpoint's.")] = "",
) -> None:
    """Ask a language-model endpoint whether it answers, takes the server's key and has the model.

    The address and the key are the server's: LLM_BASE_URL, LLM_API_KEY and LLM_MODEL, or LLM_<NAME>_BASE_URL and so on
    for an endpoint of that name. Exit code 1 and what to do when it does not work.

    Examples:

      loraline datasets probe
      loraline datasets probe fast --model my-model
    """
    output = invocation().output
    with invocation().client() as client:
        found = client.datagen.probe_endpoint(endpoint, model)
    if output.json:
        output.data(found)
        return
    output.line(f"{endpoint or 'the default endpoint'} answers, in {found.latency.ToNanoseconds() / 1e6:.0f} ms")
    for name in found.models:
        output.line(f"  {name}")
