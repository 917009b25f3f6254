"""Private inference without the mpcinfer package: the wire contract (docs/protocol.md) in one file.

    pip install numpy grpcio grpcio-tools cryptography
    python standalone_client.py cluster.toml client-bob.key client-bob.pem MODEL input.npy [input.npy ...]

Prints each output of the model as a line of JSON. Needs the .proto files: those of this checkout, or a copy in the
directory that PROTOS names.
"""

import hashlib
import importlib
import json
import os
import secrets
import socket
import ssl
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from grpc_tools import protoc

PROTOS = Path(os.environ.get("PROTOS", Path(__file__).resolve().parents[1] / "protos"))
MIB = 2**20


def generate_stubs():
    """Compile the .proto files as top-level modules party_pb2, party_pb2_grpc, tensor_pb2, and import them."""
    with tempfile.TemporaryDirectory() as directory:
        names = ("tensor.proto", "trust.proto", "party.proto")
        for name in names:
            text = (PROTOS / "mpcinfer" / "v1" / name).read_text()
            Path(directory, name).write_text(text.replace('import "mpcinfer/v1/', 'import "'))
        options = [f"-I{directory}", f"--python_out={directory}", f"--grpc_python_out={directory}"]
        if protoc.main(["protoc", *options, *(f"{directory}/{name}" for name in names)]):
            sys.exit("protoc failed")
        sys.path.insert(0, directory)
        return [importlib.import_module(name) for name in ("party_pb2", "party_pb2_grpc", "tensor_pb2")]


def connect(endpoint, index, ca, key_file, cert_file):
    """A channel to a party that has proved to hold the key that the cluster file pins, and to nobody else."""
    name = f"party-{index}.mpcinfer"  # the DNS name in its certificate, wherever it runs
    context = ssl.create_default_context(cadata=ca)
    context.load_cert_chain(cert_file, key_file)
    context.set_alpn_protocols(["h2"])
    host, _, port = endpoint["address"].rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port)), timeout=10) as plain:
        with context.wrap_socket(plain, server_hostname=name) as tls:
            der = tls.getpeercert(binary_form=True)
    public = x509.load_der_x509_certificate(der).public_key()
    spki = public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if "sha256:" + hashlib.sha256(spki).hexdigest() != endpoint["key"]:
        sys.exit(f"party/{index} at {endpoint['address']} does not hold the key that the cluster file pins")
    # gRPC cannot pin a key, but it can trust this one certificate and no CA.
    credentials = grpc.ssl_channel_credentials(
        ssl.DER_cert_to_PEM_cert(der).encode(), Path(key_file).read_bytes(), Path(cert_file).read_bytes()
    )
    options = [("grpc.ssl_target_name_override", name), ("grpc.max_receive_message_length", 256 * MIB)]
    return grpc.secure_channel(endpoint["address"], credentials, options)


def call_all(stubs, method, requests, timeout):
    """Make one call at all parties at once; their answers, or the first error."""
    # In threads of ours: one of gRPC's may keep the lock of a `future` when the program ends, which then never does.
    with ThreadPoolExecutor(len(stubs)) as pool:
        pairs = zip(stubs, requests, strict=True)
        calls = [pool.submit(getattr(stub, method), r, timeout=timeout) for stub, r in pairs]
    try:
        return [call.result() for call in calls]
    except grpc.RpcError as error:
        kind = dict(error.trailing_metadata() or ()).get("mpcinfer-error", error.code().name)
        sys.exit(f"{kind}: {error.details()}")


def encode(x, spec):
    """Fixed point: the integer nearest to x * 2^f (halves to even), as residues mod 2^64."""
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != len(spec.shape) or not all(got and spec.shape[i] in (-1, got) for i, got in enumerate(x.shape)):
        sys.exit(f"input {spec.name} has shape {list(x.shape)}, the model takes {list(spec.shape)}")
    if not (np.abs(x) < 2.0 ** (62 - 2 * spec.frac_bits)).all() or (spec.limit and not (np.abs(x) < spec.limit).all()):
        sys.exit(f"input {spec.name} contains NaN, infinity or numbers of absolute value {spec.limit:g} or more")
    return np.rint(x * 2.0**spec.frac_bits).astype(np.int64).reshape(-1).astype(np.uint64)


def key_stream(seed, count):
    """The share that a seed stands for: AES-128-CTR, 8 bytes per element, little-endian."""
    stream = Cipher(algorithms.AES(seed[:16]), modes.CTR(seed[16:])).encryptor()
    return np.frombuffer(stream.update(bytes(8 * count)), dtype="<u8")


def split(x, shape, spec, parties, tensor_pb2):
    """One Tensor per party: fresh seeds for all but the last, for the last what makes the sum right."""
    form = {"shape": shape, "frac_bits": spec.frac_bits, "ring_bits": 64}
    seeds = [secrets.token_bytes(32) for _ in range(parties - 1)]
    for seed in seeds:
        x = x - key_stream(seed, x.size)  # uint64 arithmetic is arithmetic mod 2^64
    last = x.astype("<u8").tobytes()
    return [*(tensor_pb2.Tensor(seed=seed, **form) for seed in seeds), tensor_pb2.Tensor(data=last, **form)]


def combine(tensors, spec):
    """The output: the sum of the shares, signed, and back from fixed point (integers where f = 0)."""
    count = int(np.prod(tensors[0].shape, dtype=np.int64))
    shares = [np.frombuffer(t.data, "<u8") if t.data else key_stream(t.seed, count) for t in tensors]
    total = sum(shares[1:], shares[0]).astype(np.int64).reshape(tuple(tensors[0].shape))
    return total / 2.0**spec.frac_bits if spec.frac_bits else total


def main():
    """Ask for the model, share the inputs, add up the answers."""
    if len(sys.argv) < 6:
        sys.exit(__doc__)
    cluster_file, key_file, cert_file, model_name, *files = sys.argv[1:]
    cluster = tomllib.loads(Path(cluster_file).read_text())
    ca = Path(cluster_file).parent.joinpath(cluster["ca"]).read_text()
    party_pb2, party_pb2_grpc, tensor_pb2 = generate_stubs()
    channels = [connect(endpoint, i, ca, key_file, cert_file) for i, endpoint in enumerate(cluster["party"])]
    stubs = [party_pb2_grpc.PartyServiceStub(channel) for channel in channels]
    n = len(stubs)

    lists = call_all(stubs, "ListModels", [party_pb2.ListModelsRequest()] * n, 10)
    newest = [max((m for m in a.models if m.name == model_name), key=lambda m: m.version, default=None) for a in lists]
    if None in newest or len({m.deployment_id for m in newest}) > 1:
        sys.exit(f"the parties do not all hold the same model {model_name!r}")
    model = newest[0]

    if len(files) != len(model.inputs):
        sys.exit(f"model {model_name!r} takes {len(model.inputs)} inputs, not {len(files)}")
    arrays = [np.load(file, allow_pickle=False) for file in files]
    request_id = secrets.token_bytes(16)
    requests = [party_pb2.InferRequest(request_id=request_id, model=model_name, version=model.version) for _ in stubs]
    for x, spec in zip(arrays, model.inputs, strict=True):
        for request, tensor in zip(requests, split(encode(x, spec), x.shape, spec, n, tensor_pb2), strict=True):
            request.inputs.append(tensor)
    answers = call_all(stubs, "Infer", requests, 60)
    for i, spec in enumerate(model.outputs):
        sys.stdout.write(json.dumps(combine([answer.outputs[i] for answer in answers], spec).tolist()) + "\n")


if __name__ == "__main__":
    main()
