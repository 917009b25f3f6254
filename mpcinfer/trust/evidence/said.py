"""Evidence that proves nothing about a host: none at all, and what it says itself."""

from __future__ import annotations

from mpcinfer.errors import ManifestError
from mpcinfer.trust.evidence import Expected
from mpcinfer.trust.facts import code_digest


class Nothing:
    """The operator says nothing of what runs."""

    words = "NOTHING is shown for what it runs"
    needs_collateral = False

    def produce(self, report_data: bytes) -> bytes:
        """Nothing."""
        return b""

    def verify(self, evidence: bytes, report_data: bytes, expected: Expected) -> dict[str, str]:
        """Nothing is measured."""
        if evidence:
            raise ManifestError(f'{expected.role} shows evidence but calls it "none"; its operator has to look')
        return {}


class CodeDigest:
    """The party reports the digest of its own code: an honest host's upgrade is noticed, a liar's is not."""

    words = "self-reported, not proven"
    needs_collateral = False

    def produce(self, report_data: bytes) -> bytes:
        """The digest."""
        return bytes.fromhex(code_digest())

    def verify(self, evidence: bytes, report_data: bytes, expected: Expected) -> dict[str, str]:
        """The digest; a pinned one must be the same."""
        found = {"code": evidence.hex()}
        if expected.measured is not None and found != dict(expected.measured):
            raise ManifestError(
                f"{expected.role} reports the code digest {evidence.hex()}, pinned is {expected.measured.get('code')}; "
                "ask its operator, then pin the parties again with `mpcinfer pin`"
            )
        return found
