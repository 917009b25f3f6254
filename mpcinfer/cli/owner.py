"""What a model owner does with a file: `mpcinfer explain` says what it would cost, `mpcinfer deploy` shares it."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpcinfer.cli.grants import Clients, Queries, Rate, Since, Tokens, Until, terms
from mpcinfer.cli.options import CLUSTER, ClusterPath, IdentityPath, Json
from mpcinfer.cli.output import in_bytes, in_seconds, print_json, print_table, progress
from mpcinfer.errors import ConfigError, InputError, UnsupportedError

if TYPE_CHECKING:
    from mpcinfer.client.examples import Examples
    from mpcinfer.graph.capture import Captured
    from mpcinfer.graph.explain import Explanation, Price
    from mpcinfer.graph.program import Input, Program
    from mpcinfer.models.loaded import Loaded

ModelPath = Annotated[
    str,
    typer.Argument(
        metavar="PATH",
        help="A .pt2 file of torch.export, an ONNX or GGUF file, a Hugging Face directory, or "
        "MODULE_OR_FILE.py:FUNCTION returning (model, example_inputs).",
    ),
]
Inputs = Annotated[
    list[str] | None,
    typer.Option(help="An input, as name:float[1,3,224,224] or name:int[1..256], where the file does not say it."),
]
Samples = Annotated[
    list[Path] | None,
    typer.Option(help="Real inputs to calibrate limits on: .npy for one input, .npz or .safetensors for all."),
]
Task = Annotated[str | None, typer.Option(help="What a Hugging Face model is to do.")]
Reveal = Annotated[
    str,
    typer.Option(
        help="What clients learn: logits (the default), probabilities, top-k or argmax; of a language model tokens "
        "(the default), or logits too.",
        show_default=False,
    ),
]
Context = Annotated[
    int | None, typer.Option(help="Of a language model: the most tokens of a text with its answer.", min=2)
]
TopK = Annotated[int, typer.Option("--k", min=1, help="How many indices top-k reveals.")]
FracBits = Annotated[int, typer.Option(help="Precision: fraction bits, 8 to 24.")]
PublicNames = Annotated[list[str] | None, typer.Option(help="The name of a constant that is no secret.")]


def explain(
    path: ModelPath,
    inputs: Inputs = None,
    samples: Samples = None,
    parties: Annotated[int, typer.Option(min=2, help="How many parties.")] = 2,
    at: Annotated[
        list[str] | None, typer.Option(help="A free size, as length=32 (default: its maximum).", show_default=False)
    ] = None,
    task: Task = None,
    context: Context = None,
    reveal: Reveal = "",
    k: TopK = 5,
    frac_bits: FracBits = 16,
    public: PublicNames = None,
    rounds: Annotated[
        bool, typer.Option("--rounds", help="List the rounds step by step, in the order in which they are run.")
    ] = False,
    as_json: Json = False,
) -> None:
    """What a request would cost, layer by layer, before anything is deployed. Needs no cluster.

    Of a language model: a step that takes in --at new=1 token after --at cached=63 others, and chooses the next.
    """
    from mpcinfer.client.price import price, price_of_step

    loaded, examples = load_model(path, inputs, samples, task, context)
    sizes = dict(map(_size, at or ()))
    shapes = [] if loaded.context else examples.shapes(sizes)
    try:
        captured = _capture(loaded, examples, frac_bits=frac_bits, reveal=reveal, k=k, public=public or ())
    except UnsupportedError as error:
        if error.missing and not as_json:
            print_table(["OPERATOR", "AT"], [[op, place] for op, places in error.missing.items() for place in places])
        raise
    if loaded.context:
        new, cached = _step_sizes(sizes, loaded.context)
        explained = price_of_step(captured.program, new, cached, parties=parties)
    else:
        explained = price(captured.program, shapes, parties=parties)
    if as_json:
        content = asdict(explained)
        if not rounds:
            del content["steps"]  # thousands, of a language model
        print_json({"model": loaded.kind, "examples": examples.origin, "reveal": captured.program.reveal, **content})
        return
    _print_inputs(explained, captured.program, f"{loaded.kind}, reveals {captured.program.reveal}", examples)
    (_print_rounds if rounds else _print_layers)(explained)


def deploy(
    path: ModelPath,
    name: Annotated[str, typer.Option(help="What clients call the model.")],
    inputs: Inputs = None,
    samples: Samples = None,
    task: Task = None,
    context: Context = None,
    reveal: Reveal = "",
    k: TopK = 5,
    frac_bits: FracBits = 16,
    public: PublicNames = None,
    clients: Clients = None,
    queries: Queries = None,
    tokens: Tokens = None,
    rate: Rate = 0,
    since: Since = None,
    until: Until = None,
    timeout: Annotated[float, typer.Option(help="Seconds.")] = 1800.0,
    cluster: ClusterPath = CLUSTER,
    identity: IdentityPath = None,
    as_json: Json = False,
) -> None:
    """Share a model among the parties. A name that exists gets a new version."""
    from mpcinfer.client.owner import ModelOwner

    granted = terms(clients, queries, tokens, rate, since, until)
    # The cheap checks first: exporting a large model takes its time.
    with ModelOwner.connect(cluster, identity) as model_owner, progress(as_json) as report:
        loaded, examples = load_model(path, inputs, samples, task, context)
        captured = _capture(loaded, examples, frac_bits=frac_bits, reveal=reveal, k=k, public=public or ())
        calibrated = not all(declared.proven for declared in captured.program.inputs)
        numbers = [declared.name for declared in captured.program.inputs if declared.frac_bits]
        if calibrated and numbers and not examples.real:
            raise InputError(
                f"how large {', '.join(numbers)} may be must be calibrated on real inputs: give some with --samples"
            )
        deployed = model_owner.upload(
            captured, name=name, vocabulary=loaded.words(), grant=granted, progress=report, timeout=timeout
        )
    if as_json:
        print_json({**asdict(deployed), "calibrated_on": examples.origin if calibrated else None})
        return
    print(f"deployed {deployed.name} version {deployed.version} ({deployed.parameters} secret parameters)")
    print(f"granted to {granted.words()}")
    if calibrated and not examples.real:
        print(f"limits were calibrated on {examples.origin}")


# --- what PATH stands for --------------------------------------------------------------------------------------------


def load_model(
    path: str,
    inputs: Sequence[str] | None,
    samples: Sequence[Path] | None,
    task: str | None,
    context: int | None,
) -> tuple[Loaded, Examples]:
    """The model at a path, and examples of its inputs."""
    from mpcinfer.client.examples import example_inputs, read_samples
    from mpcinfer.models.load import load
    from mpcinfer.models.loaded import parse_inputs

    specs = parse_inputs(inputs or ())
    own: Sequence[Any] = ()
    if ":" in path and not Path(path).exists():
        loaded, own = _from_function(path)
    else:
        loaded = load(Path(path), specs or None, task, context)
    given = read_samples(samples, [spec.name for spec in specs or loaded.inputs]) if samples else own
    return loaded, example_inputs(loaded, specs, given)


def _capture(loaded: Loaded, examples: Examples, **options: Any) -> Captured:
    from mpcinfer.client.examples import captured_model

    return captured_model(loaded, examples, **options)


def _step_sizes(sizes: dict[str, int], context: int) -> tuple[int, int]:
    """How many tokens are new and how many are cached."""
    unknown = sorted(set(sizes) - {"new", "cached"})
    new, cached = sizes.get("new", 1), sizes.get("cached", min(63, context - 1))
    if unknown or new < 1 or new + cached > context:
        raise InputError(f"of a language model name new and cached, {context} in all at most, as --at cached=255")
    return new, cached


def _from_function(path: str) -> tuple[Loaded, Sequence[Any]]:
    import torch

    from mpcinfer.models.loaded import Loaded

    source, _, function = path.rpartition(":")
    try:
        model, examples = getattr(_load_module(source), function)()
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__} at {at.filename}:{at.lineno}: {error}"
        raise InputError(f"{path} does not give (model, example_inputs): {what}") from error
    return Loaded(model, (), "Python function"), (examples,) if isinstance(examples, torch.Tensor) else tuple(examples)


def _load_module(source: str) -> Any:
    if not source.endswith(".py"):
        sys.path.insert(0, str(Path.cwd()))
        return importlib.import_module(source)
    file = Path(source)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise ConfigError(f"no file {source}")
    sys.path.insert(0, str(file.parent.absolute()))  # as if it were run: it may import its neighbours
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module


def _size(text: str) -> tuple[str, int]:
    name, _, value = text.partition("=")
    if not name or not value.isdecimal():
        raise InputError(f"{text!r} is not a size: write length=32")
    return name, int(value)


# --- the explanation -------------------------------------------------------------------------------------------------

_COSTS = ["ROUNDS", "ONLINE", "OFFLINE", "LAN", "WAN", "LAN BEFORE", "WAN BEFORE"]


def _print_inputs(explained: Explanation, program: Program, what: str, examples: Examples) -> None:
    print(f"{what}; {explained.deployment.parameters} secret parameters, {explained.parties} parties")
    for i, (declared, shape) in enumerate(zip(program.inputs, explained.shapes, strict=True)):
        print(f"input {declared.name} {list(shape)}, {_limit(declared, examples, i)}")
    print()


def _print_rounds(explained: Explanation) -> None:
    rows = [
        [
            str(step.first) if step.rounds == 1 else f"{step.first}-{step.first + step.rounds - 1}",
            str(step.rounds),
            in_bytes(step.online_bytes),
            " ".join(step.layers),
            " ".join(map(_short, step.operators)),
        ]
        for step in explained.steps
    ]
    total = explained.total
    rows.append(["total", str(total.rounds), in_bytes(total.online_bytes), "", ""])
    print_table(["ROUND", "ROUNDS", "ONLINE", "LAYERS", "OPERATORS"], rows, numbers=["ROUNDS", "ONLINE"])
    print("\na step: rounds one after another with openings of the same layers; ONLINE: what each party sends in it")


def _print_layers(explained: Explanation) -> None:
    deployment, total = explained.deployment, explained.total
    rows = [
        [layer.path, " ".join(_short(op) for op in dict.fromkeys(layer.operators)), *_costs(layer.price)]
        for layer in explained.layers
        if layer.price.correlations
    ]
    headers = {kind: in_bytes(size) for kind, size in explained.headers.items()}
    rows.append(["frame headers", "", "", headers["online_bytes"], headers["offline_bytes"], "", "", "", ""])
    rows.append(["total", "", *_costs(total)])
    print_table(["LAYER", "OPERATORS", *_COSTS], rows, numbers=_COSTS)
    print("\nlayers that cost nothing are left out")
    print("ONLINE: what each party sends; OFFLINE: what the dealer sends, before the input is there (as in BEFORE)")
    print("rounds and bytes are exact, seconds estimates: LAN 1 Gbit/s, 0.5 ms round trip; WAN 200 Mbit/s, 40 ms")
    print(f"correlations: {', '.join(f'{count} {kind}' for kind, count in total.correlations.items()) or 'none'}\n")
    print(
        f"to deploy: upload {in_bytes(deployment.upload)}, then {deployment.rounds} round, "
        f"{in_bytes(deployment.online_bytes)} from each party; for weights each party holds "
        f"{in_bytes(deployment.memory_of_a_party)} of memory, the dealer {in_bytes(deployment.memory_of_the_dealer)}"
    )


def _costs(price: Price) -> list[str]:
    return [
        str(price.rounds),
        in_bytes(price.online_bytes),
        in_bytes(price.offline_bytes),
        *(in_seconds(s) for phase in (price.online_seconds, price.offline_seconds) for s in phase.values()),
    ]


def _limit(declared: Input, examples: Examples, position: int) -> str:
    """What the input must stay below, where that comes from, and how near the examples come."""
    if not declared.frac_bits:
        how = "all proven" if declared.proven else f"numbers in the model calibrated on {examples.origin}"
        return f"indices below {declared.limit:g} ({how})"
    how = "proven" if declared.proven else f"calibrated on {examples.origin}"
    reach = f", these reach {float(examples.tensors[position].abs().max()):.3g}" if examples.tensors else ""
    return f"absolute values below {declared.limit:g} ({how}{reach if not declared.proven else ''})"


def _short(op: str) -> str:
    return op.split(".")[1]
