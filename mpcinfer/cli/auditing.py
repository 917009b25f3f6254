"""`mpcinfer canaries`: a model owner's inputs with known answers; and what clients do with them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpcinfer.cli.options import CLUSTER, ClusterPath, IdentityPath, Json, ModelVersion
from mpcinfer.cli.output import print_json
from mpcinfer.cli.owner import Context, Inputs, ModelPath, Task, load_model
from mpcinfer.errors import InputError

if TYPE_CHECKING:
    from mpcinfer.client.data import Client

AuditFile = Annotated[
    Path | None, typer.Option("--audit", help="Canaries from the model's owner, to be mixed among the requests.")
]
AuditRate = Annotated[float, typer.Option(help="How many of the requests are canaries, on average.")]
RATE = 0.1


def set_audit(client: Client, file: Path | None, rate: float) -> None:
    """From now on the client's requests are audited, if there is a file."""
    if file is not None:
        from mpcinfer.client.audit import Audit

        client.audit = Audit(rate, client.canaries(file))


def canaries(
    path: ModelPath,
    name: Annotated[str, typer.Option(help="What the model is deployed as.")],
    out: Annotated[Path, typer.Option(help="The file to write: for clients, and not for the parties.")],
    samples: Annotated[
        list[Path] | None,
        typer.Option(help="Inputs: .npy for one input, .npz or .safetensors for all; each row is a canary."),
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="Of a language model: a file with a text on each line.")] = None,
    length: Annotated[
        list[int] | None, typer.Option(min=1, help="Of a prompt, in tokens: texts are cut to it (default: whole).")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="How many tokens a text is continued by.")] = 32,
    margin: Annotated[float, typer.Option(help="By how much a logit must exceed the next one.")] = 0.25,
    inputs: Inputs = None,
    task: Task = None,
    context: Context = None,
    version: ModelVersion = 0,
    cluster: ClusterPath = CLUSTER,
    identity: IdentityPath = None,
    as_json: Json = False,
) -> None:
    """Sign inputs with the answers that a model has for them, so that clients can check on the parties."""
    from mpcinfer.client.locate import locate
    from mpcinfer.client.owner import ModelOwner
    from mpcinfer.models.decoder import Decoder
    from mpcinfer.trust.canaries import opened, write

    members, owner = locate(cluster, identity, roles=("owner",))
    with ModelOwner.connect(members, owner) as model_owner:
        loaded, examples = load_model(path, inputs, samples, task, context)
        given: list[Any] = [examples.tensors]
        if isinstance(loaded.module, Decoder):
            if prompts is None:
                raise InputError("canaries of a language model are made of texts: give a file with --prompts")
            given = _prompts(loaded, prompts, length or ())
        signed = model_owner.canaries(
            name, loaded.module, given, version=version, max_new_tokens=max_new_tokens, margin=margin
        )
    write(signed, out)
    made = opened(signed, members)
    count = len(made.examples) + len(made.texts)
    if as_json:
        print_json({"file": str(out), "model": made.model, "version": made.version, "canaries": count})
    else:
        print(f"{count} canaries of {made.model} version {made.version} in {out}")


def _prompts(loaded: Any, file: Path, lengths: Any) -> list[Any]:
    """The ids of the texts in a file, each whole, or cut to each length that it reaches."""
    from mpcinfer.client.text import Tokenizer

    if loaded.vocabulary is None:
        raise InputError("the model's file has no tokenizer, so texts cannot be turned into its tokens")
    tokenizer = Tokenizer.of(loaded.vocabulary)
    try:
        texts = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {file}: {getattr(error, 'strerror', None) or 'it is no text'}") from error
    ids = [tokenizer.ids(text) for text in texts]
    return [each[:n] for each in ids for n in lengths if n <= len(each)] if lengths else ids
