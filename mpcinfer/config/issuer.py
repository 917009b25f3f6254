"""Identity providers whose tokens a party takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mpcinfer.config.reading import Table, check_name, check_role
from mpcinfer.errors import ConfigError

TOKEN_ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")


@dataclass(frozen=True)
class Issuer:
    """An identity provider (OIDC) whose tokens a party takes: their subjects are the clients jwt/NAME/SUBJECT.

    `issuer` and `audience` are what tokens must say, `jwks` the file or https URL of its public keys, `gateways` the
    roles whose connections may bring its tokens.
    """

    name: str
    issuer: str
    audience: str
    jwks: str
    gateways: tuple[str, ...]
    algorithms: tuple[str, ...] = ("RS256", "ES256")
    leeway_s: int = 30

    def __post_init__(self) -> None:
        check_name(self.name)
        if not (self.issuer and self.audience and self.jwks) or "://" in self.jwks.removeprefix("https://"):
            raise ConfigError(f"issuer {self.name!r} needs issuer, audience, and jwks: a file or an https URL")
        if not self.gateways or not all(r.startswith("client/") and check_role(r) for r in self.gateways):
            raise ConfigError(f"issuer {self.name!r} needs gateways: roles client/NAME that may bring its tokens")
        if not self.algorithms or not {*self.algorithms} <= {*TOKEN_ALGORITHMS} or not 0 <= self.leeway_s <= 300:
            raise ConfigError(
                f"issuer {self.name!r}: algorithms are some of {', '.join(TOKEN_ALGORITHMS)}, leeway_s is 0 to 300"
            )


def read_issuer(table: Table, here: Path) -> Issuer:
    """The issuer in a table of a node file; `here`: the directory that paths in it are relative to."""
    name, issuer, audience, jwks = (table.take(key, str) for key in ("name", "issuer", "audience", "jwks"))
    gateways, algorithms = table.take("gateways", list), table.take("algorithms", list, list(Issuer.algorithms))
    leeway, source = table.take("leeway_s", int, Issuer.leeway_s), jwks if "://" in jwks else str(here / jwks)
    table.finish()
    return Issuer(name, issuer, audience, source, tuple(gateways), tuple(algorithms), leeway)
