"""Quotes of Intel's TDX and SGX: the processor vouches for what was loaded into an isolated part of a host.

Made where the kernel (TDX: configfs-tsm) or the library OS (SGX: /dev/attestation) offers it, verified with `dcap-qvl`
(the extra `attestation`) against Intel's root. What it takes besides the quote, the *collateral*, has a date and
comes from where the client's own operator says, never from the party.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mpcinfer.errors import ManifestError
from mpcinfer.trust.evidence import Expected

_GOOD = "UpToDate"


class _Quote:
    """What both have in common."""

    words = ""
    needs_collateral = True
    type = ""
    measures: tuple[str, ...] = ()

    def verify(self, evidence: bytes, report_data: bytes, expected: Expected) -> dict[str, str]:
        """See `Evidence.verify`. What is measured, and the state of the platform's firmware as Intel sees it."""
        library, who = _library(), f"the {self.type} quote of {expected.role}"
        try:
            quote = library.parse_quote(evidence)
            kind, report = quote.quote_type(), quote.report
        except ValueError as error:
            raise ManifestError(f"{who} is no quote, or was cut short; its operator has to look") from error
        if kind != self.type:
            raise ManifestError(f"{who} is one of {kind}; its operator has to look")
        if not hmac.compare_digest(report.report_data, report_data):
            raise ManifestError(
                f"{who} is not bound to its keys and to this connection: it is an old one, or another host's. Its "
                "operator has to look"
            )
        if self.is_debug(report):
            raise ManifestError(f"{who} is of a debug {self.type}, which its host can look into; do not use it")
        try:
            status = library.verify(evidence, _collateral(library, evidence, expected), now()).status
        except ValueError as error:
            reason = (str(error).splitlines() or [""])[0].removeprefix("Verification failed: ")
            raise ManifestError(
                f"{who} does not hold: {reason}. Fetch newer collateral; if that does not help, ask its operator"
            ) from error
        found = {"tcb": status, **{name: getattr(report, name).hex() for name in self.measures}}
        self._compare(found, who, expected)
        return found

    def is_debug(self, report: Any) -> bool:
        """Whether the host can look inside."""
        raise NotImplementedError

    def _compare(self, found: dict[str, str], who: str, expected: Expected) -> None:
        if expected.measured is None:
            return
        for name, value in found.items():
            pinned = expected.measured.get(name)
            if value != pinned and (name, value) != ("tcb", _GOOD):
                raise ManifestError(
                    f"{who} measures another {name} than was pinned: {value}, not {pinned}. Nothing was sent. Ask its "
                    "operator, then pin the parties again with `mpcinfer pin`"
                )


class Tdx(_Quote):
    """A quote of a trust domain: a virtual machine that its host cannot look into."""

    words = "a TDX quote bound to its keys: what its virtual machine has measured"
    type = "TDX"
    measures = ("mr_td", "rt_mr0", "rt_mr1", "rt_mr2", "rt_mr3", "mr_config_id")
    reports = Path("/sys/kernel/config/tsm/report")

    def produce(self, report_data: bytes) -> bytes:
        """Ask the kernel."""
        entry = self.reports / f"mpcinfer-{secrets.token_hex(8)}"
        try:
            entry.mkdir()
            try:
                (entry / "inblob").write_bytes(report_data)
                return (entry / "outblob").read_bytes()
            finally:
                entry.rmdir()
        except OSError as error:
            raise ManifestError(
                f"this host makes no TDX quotes: {error.strerror}; it is no trust domain, or {self.reports} is not "
                "there or not writable. Mend that, or show other evidence"
            ) from error

    def is_debug(self, report: Any) -> bool:
        """Whether any of the bits is set that put a trust domain under debug."""
        return bool(report.td_attributes[0])


class Sgx(_Quote):
    """A quote of an enclave, as Gramine and others that run whole programs in one offer it."""

    words = "an SGX quote bound to its keys: which enclave runs, and who has signed it"
    type = "SGX"
    measures = ("mr_enclave", "mr_signer")
    device = Path("/dev/attestation")

    def produce(self, report_data: bytes) -> bytes:
        """Ask the library OS."""
        try:
            (self.device / "user_report_data").write_bytes(report_data)
            return (self.device / "quote").read_bytes()
        except OSError as error:
            raise ManifestError(
                f"this process makes no SGX quotes: {error.strerror}; it runs in no enclave, or {self.device} is not "
                "there. Mend that, or show other evidence"
            ) from error

    def is_debug(self, report: Any) -> bool:
        """The DEBUG attribute."""
        return bool(report.attributes[0] & 0x02)


def now() -> int:
    """Seconds since 1970: collateral and certificates have dates."""
    return int(time.time())


def _library() -> Any:
    try:
        import dcap_qvl
    except ImportError as error:
        raise ManifestError(
            "quotes are checked with dcap-qvl, which is not installed: pip install 'mpcinfer[attestation]'"
        ) from error
    return dcap_qvl


def _collateral(library: Any, quote: bytes, expected: Expected) -> Any:
    """From a service, a file, or the party's own file in a directory."""
    where = expected.collateral
    if not where:
        raise ManifestError(
            f"the quote of {expected.role} cannot be checked without collateral: say in MPCINFER_COLLATERAL where it is"
        )
    try:
        if where.startswith(("https://", "http://")):

            async def fetch() -> Any:
                return await library.get_collateral(where, quote)

            with ThreadPoolExecutor(1) as pool:  # the caller's thread may have an event loop that runs
                return pool.submit(lambda: asyncio.run(fetch())).result()
        path = Path(where)
        file = path / f"{expected.role.replace('/', '-')}.json" if path.is_dir() else path
        return library.QuoteCollateralV3.from_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError) as error:
        raise ManifestError(
            f"no collateral for the quote of {expected.role} where MPCINFER_COLLATERAL says; fetch it"
        ) from error
