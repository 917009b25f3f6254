"""mpcinfer: inference on a network nobody may see, over inputs nobody may see, by parties that see neither.

What it exports is loaded on first use; type checkers read `__init__.pyi`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

__all__ = [
    "AbortedError",
    "AgreementError",
    "AsyncClient",
    "Audit",
    "Budget",
    "BudgetError",
    "BusyError",
    "Client",
    "ConfigError",
    "ConflictError",
    "ContextLengthError",
    "DeadlineError",
    "Deployed",
    "DtypeError",
    "ForbiddenError",
    "GrantError",
    "IdentityError",
    "InputError",
    "ManifestError",
    "ModelOwner",
    "MpcInferError",
    "NotFoundError",
    "ProtocolError",
    "RangeError",
    "ShapeError",
    "SignatureError",
    "StoreError",
    "TamperingError",
    "Terms",
    "UnavailableError",
    "UnsupportedError",
    "UploadError",
]

_HOMES = {
    "AsyncClient": "client.aio",
    "Audit": "client.audit",
    "Budget": "trust.grant",
    "Client": "client.data",
    "Deployed": "client.owner",
    "ModelOwner": "client.owner",
    "Terms": "trust.grant",
}


def __getattr__(name: str) -> Any:
    # On first use only: a party's process never loads the client, nor a data owner's the exporter of models.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
