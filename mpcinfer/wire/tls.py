"""TLS contexts of the standard library, for what does not go through gRPC."""

from __future__ import annotations

import secrets
import ssl
import tempfile
from pathlib import Path

from cryptography.hazmat.primitives import serialization

from mpcinfer.config import Cluster
from mpcinfer.wire.identity import Identity


def tls_context(cluster: Cluster, identity: Identity, *, server: bool = False) -> ssl.SSLContext:
    """TLS 1.3 with `identity`, trusting the cluster's CA; a server asks for the caller's certificate.

    Pins are not checked here: see `identity.peer_from_certificate`.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=cluster.ca_pem.decode())
    if server:
        context.verify_mode = ssl.CERT_REQUIRED
        context.num_tickets = 0  # nobody resumes, and a ticket would arrive where nobody reads
    # The standard library takes a key only from a file, so it goes there encrypted with a passphrase used once.
    passphrase = secrets.token_bytes(32).hex().encode()
    key = serialization.load_pem_private_key(identity.key_pem, password=None)
    with tempfile.TemporaryDirectory() as directory:
        key_file, cert_file = Path(directory, "key"), Path(directory, "certificate")
        key_file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.BestAvailableEncryption(passphrase),
            )
        )
        cert_file.write_bytes(identity.cert_pem)
        context.load_cert_chain(cert_file, key_file, password=passphrase)
    return context
