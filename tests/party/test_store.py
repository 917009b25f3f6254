"""The encrypted store: what goes in comes out, what was touched is refused, and a crash leaves all or nothing."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st

import mpcinfer.party.record as record_module
from mpcinfer.errors import ConflictError, InputError, NotFoundError, StoreError, UploadError
from mpcinfer.party.record import HEADER, SEAL_SIZE, TAG, Deployment, Staged, WeightEntry
from mpcinfer.party.store import Store

KEY = bytes(range(32))
SMALL_CHUNK = 64
FRONT = HEADER.size + SEAL_SIZE
METADATA = {"name": "digits", "owner": "owner/ann", "program": '{"nodes": ["canary-program-text"]}', "created": 1.5}
SEED = b"canary-seed-0123"


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks in a small file, so that every byte of it can be tried."""
    monkeypatch.setattr(record_module, "CHUNK", SMALL_CHUNK)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "store"


def upload(
    store: Store, entries: list[WeightEntry], payload: bytes, request: bytes = b"request", step: int = 7
) -> Staged:
    staged = store.stage(request, METADATA, entries)
    for start in range(0, len(payload), step):
        staged.write(payload[start : start + step])
    staged.finish(len(payload), hashlib.sha256(payload).digest())
    return staged


def deploy(
    store: Store, deployment_id: bytes = b"\x01" * 16, fill: int = 5, version: int = 1
) -> tuple[Deployment, bytes]:
    """A deployment of three weights, the middle one by seed; gives the bytes of the others."""
    entries = [
        WeightEntry("w", (4, 5), 16),
        WeightEntry("masked", (1000, 1000), 16, SEED),
        WeightEntry("b", (3,), 16),
    ]
    payload = bytes((fill + i) % 256 for i in range(8 * 23))
    upload(store, entries, payload)
    return store.commit(b"request", deployment_id, version), payload


def path_of(directory: Path, deployment_id: bytes = b"\x01" * 16) -> Path:
    return directory / "deployments" / f"{deployment_id.hex()}.mpc"


def read_all(store: Store, deployment_id: bytes = b"\x01" * 16) -> list[tuple[WeightEntry, bytes | None]]:
    return [(entry, None if data is None else bytes(data)) for entry, data in store.weights(deployment_id)]


def assert_refused(directory: Path, path: Path, key: bytes = KEY) -> StoreError:
    """The file is listed as damaged, named in the error with the remedy, and gives no data."""
    with Store(directory, key) as store:
        assert path.stem in store.damaged
        error = store.damaged[path.stem]
        assert str(path) in str(error)
        assert "remove the model and deploy it again" in str(error)
        assert path.stem not in [d.id.hex() for d in store.deployments()]
        with pytest.raises(StoreError):
            next(store.weights(bytes.fromhex(path.stem)))
        return error


# --- round trip -------------------------------------------------------------------------------------------------------


def test_a_deployment_survives_a_restart(directory: Path) -> None:
    with Store(directory, KEY) as store:
        committed, payload = deploy(store, version=3)
        assert store.deployments() == [committed]
    with Store(directory, KEY) as store:
        assert store.deployments() == [committed]
        assert store.damaged == {}
        assert (committed.version, committed.metadata) == (3, METADATA)
        contents = read_all(store)
    assert [entry for entry, _ in contents] == list(committed.weights)
    assert [data for _, data in contents] == [payload[:160], None, payload[160:]]
    assert contents[1][0].seed == SEED


@settings(max_examples=60, deadline=None)
@given(elements=st.lists(st.integers(0, 40), max_size=5), step=st.integers(1, 200), pad=st.integers(0, SMALL_CHUNK))
def test_round_trip_around_chunk_boundaries(
    elements: list[int], step: int, pad: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    entries = [WeightEntry("p" * pad if i == 0 else str(i), (n,), 16) for i, n in enumerate(elements)]
    payload = os.urandom(8 * sum(elements))
    directory = tmp_path_factory.mktemp("round") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record_module, "CHUNK", SMALL_CHUNK)
        with Store(directory, KEY) as store:
            upload(store, entries, payload, step=step)
            store.commit(b"request", b"id", 1)
        with Store(directory, KEY) as store:
            assert b"".join(data for _, data in read_all(store, b"id") if data is not None) == payload


@pytest.mark.parametrize("extra", range(-9, 10))
def test_plaintext_of_exactly_whole_chunks(directory: Path, small_chunks: None, extra: int) -> None:
    """The name's length shifts the plaintext by single bytes past a chunk boundary."""
    with Store(directory, KEY) as store:
        upload(store, [WeightEntry("x" * (40 + extra), (8,), 16)], bytes(range(64)))
        store.commit(b"request", b"id", 1)
        assert read_all(store, b"id")[0][1] == bytes(range(64))


@pytest.mark.parametrize("elements", [0, 1, (1 << 17) - 50, 1 << 17, 3 << 17])
def test_round_trip_with_the_real_chunk_size(directory: Path, elements: int) -> None:
    payload = os.urandom(8 * elements)
    with Store(directory, KEY) as store:
        upload(store, [WeightEntry("w", (elements,), 16)], payload, step=1 << 19)
        store.commit(b"request", b"id", 1)
        assert read_all(store, b"id")[0][1] == payload


def test_the_same_upload_twice_gives_unrelated_files(directory: Path) -> None:
    """The salt is fresh, so equal plaintexts do not show."""
    with Store(directory, KEY) as store:
        deploy(store, b"\x01" * 16)
        deploy(store, b"\x02" * 16)
    first, second = (path_of(directory, bytes([i]) * 16).read_bytes() for i in (1, 2))
    assert len(first) == len(second)
    assert all(first[i : i + 8] != second[i : i + 8] for i in range(FRONT, len(first) - 8))


def test_deployments_are_sorted_and_removable(directory: Path) -> None:
    with Store(directory, KEY) as store:
        for version, identifier in ((2, b"\x01" * 16), (1, b"\x02" * 16)):
            deploy(store, identifier, version=version)
        assert [d.version for d in store.deployments()] == [1, 2]
        store.remove(b"\x02" * 16)
        assert [d.version for d in store.deployments()] == [2]
        with pytest.raises(NotFoundError):
            store.remove(b"\x02" * 16)
        with pytest.raises(NotFoundError):
            next(store.weights(b"\x02" * 16))
    with Store(directory, KEY) as store:
        assert [d.version for d in store.deployments()] == [2]


def test_the_format_is_the_one_described(directory: Path, small_chunks: None) -> None:
    """Files of a format must stay readable, and each part of the construction must be there: decrypted here by hand."""
    with Store(directory, KEY) as store:
        _, payload = deploy(store, version=7)
    path = path_of(directory)
    whole = path.read_bytes()
    header, seal, body = whole[:34], whole[34:54], whole[54:]

    def derive(salt: bytes | None, info: bytes, size: int) -> bytes:
        return HKDF(SHA256(), size, salt, info).derive(KEY)

    assert header[:18] == b"mpcstore" + bytes([0, 1]) + derive(None, b"mpcinfer store v1 key id", 8)
    cipher = AESGCM(derive(header[18:], b"mpcinfer store v1 file", 32))
    assert cipher.decrypt(bytes(11) + b"\x02", seal, header + b"\x01" * 16) == (7).to_bytes(4, "big")
    sealed = [body[i : i + SMALL_CHUNK + TAG] for i in range(0, len(body), SMALL_CHUNK + TAG)]
    plain = b"".join(
        cipher.decrypt(i.to_bytes(11, "big") + bytes([i == len(sealed) - 1]), chunk, header)
        for i, chunk in enumerate(sealed)
    )
    length = int.from_bytes(plain[:8], "big")
    assert json.loads(plain[8 : 8 + length]) == {
        "metadata": METADATA,
        "weights": [["w", [4, 5], 16, None], ["masked", [1000, 1000], 16, SEED.hex()], ["b", [3], 16, None]],
    }
    assert plain[8 + length :] == payload


# --- damage -----------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_anywhere_is_refused(directory: Path, small_chunks: None) -> None:
    """Magic, version, key id, salt, seal, every chunk and every tag: one bit of each byte of the file."""
    with Store(directory, KEY) as store:
        deploy(store)
    path = path_of(directory)
    whole = path.read_bytes()
    assert len(whole) > FRONT + 4 * (SMALL_CHUNK + TAG)
    for position in range(len(whole)):
        touched = bytearray(whole)
        touched[position] ^= 1 << (position % 8)
        path.write_bytes(touched)
        assert_refused(directory, path)
    path.write_bytes(whole)
    with Store(directory, KEY) as store:
        assert store.damaged == {}


def test_a_truncated_or_longer_file_is_refused(directory: Path, small_chunks: None) -> None:
    """Cut at every length, all chunk boundaries among them; longer by a byte, a chunk, a copy of a chunk."""
    with Store(directory, KEY) as store:
        deploy(store)
    path = path_of(directory)
    whole = path.read_bytes()
    sealed = SMALL_CHUNK + TAG
    boundaries = set(range(FRONT, len(whole), sealed))
    assert len(boundaries) >= 5
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert_refused(directory, path)
    last = whole[max(boundaries) :]
    for extra in (b"\0", bytes(sealed), last, whole[FRONT : FRONT + sealed]):
        path.write_bytes(whole + extra)
        assert_refused(directory, path)


def test_reordered_repeated_and_dropped_chunks_are_refused(directory: Path, small_chunks: None) -> None:
    with Store(directory, KEY) as store:
        deploy(store)
    path = path_of(directory)
    whole = path.read_bytes()
    sealed = SMALL_CHUNK + TAG
    chunks = [whole[i : i + sealed] for i in range(FRONT, len(whole), sealed)]
    assert len(chunks) >= 6  # weights fill whole chunks of their own: their order shows in no JSON
    changes = [[*chunks[:i], chunks[i + 1], chunks[i], *chunks[i + 2 :]] for i in range(len(chunks) - 1)]
    changes += [[*chunks[:i], chunks[i - 1], *chunks[i + 1 :]] for i in range(1, len(chunks))]
    changes += [[*chunks[:i], *chunks[i + 1 :]] for i in range(len(chunks))]
    changes += [[*chunks[:i], chunks[i], *chunks[i:]] for i in range(len(chunks))]
    for changed in changes:
        path.write_bytes(whole[:FRONT] + b"".join(changed))
        assert_refused(directory, path)


def test_swapped_files_and_parts_of_files_are_refused(directory: Path, small_chunks: None) -> None:
    with Store(directory, KEY) as store:
        deploy(store, b"\x01" * 16, fill=1)
        deploy(store, b"\x02" * 16, fill=2, version=2)
    one, two = path_of(directory, b"\x01" * 16), path_of(directory, b"\x02" * 16)
    first, second = one.read_bytes(), two.read_bytes()
    assert len(first) == len(second)
    one.write_bytes(second)
    two.write_bytes(first)
    assert_refused(directory, one)
    assert_refused(directory, two)
    two.write_bytes(second)
    for start, end in ((0, HEADER.size), (HEADER.size, FRONT), (FRONT, FRONT + SMALL_CHUNK + TAG), (0, FRONT)):
        one.write_bytes(first[:start] + second[start:end] + first[end:])
        assert_refused(directory, one)


def test_a_damaged_file_does_not_stop_the_others_and_can_be_removed(directory: Path) -> None:
    with Store(directory, KEY) as store:
        deploy(store, b"\x01" * 16)
        healthy, _ = deploy(store, b"\x02" * 16)
    path_of(directory).write_bytes(b"garbage")
    (directory / "deployments" / "no-id.mpc").write_bytes(b"")
    with Store(directory, KEY) as store:
        assert store.deployments() == [healthy]
        assert set(store.damaged) == {"01" * 16, "no-id"}
        assert len(read_all(store, b"\x02" * 16)) == 3
        store.remove(b"\x01" * 16)
        assert set(store.damaged) == {"no-id"}
    assert not path_of(directory).exists()


def test_damage_after_the_start_is_found_before_any_weight_is_handed_out(directory: Path, small_chunks: None) -> None:
    with Store(directory, KEY) as store:
        upload(store, [WeightEntry("first", (1,), 16), WeightEntry("second", (100,), 16)], bytes(808))
        store.commit(b"request", b"\x01" * 16, 1)
        path = path_of(directory)
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # the tag of the last chunk
        with pytest.raises(StoreError, match="remove the model and deploy it again"):
            next(store.weights(b"\x01" * 16))
        path.unlink()
        with pytest.raises(StoreError, match="cannot be read"):
            next(store.weights(b"\x01" * 16))


def test_a_wrong_key_is_refused_and_named_as_a_possible_cause(directory: Path) -> None:
    with Store(directory, KEY) as store:
        deploy(store)
    assert "another store key" in str(assert_refused(directory, path_of(directory), key=bytes(32)))
    with Store(directory, KEY) as store:
        assert store.damaged == {}


def test_a_staged_file_moved_by_hand_is_no_deployment(directory: Path) -> None:
    with Store(directory, KEY) as store:
        upload(store, [WeightEntry("w", (1,), 16)], bytes(8))
        [part] = (directory / "staging").iterdir()
        path_of(directory).write_bytes(part.read_bytes())
    assert_refused(directory, path_of(directory))


# --- uploads ----------------------------------------------------------------------------------------------------------


def start(store: Store) -> Staged:
    staged = store.stage(b"request", METADATA, [WeightEntry("w", (4,), 16)])
    staged.write(bytes(16))
    return staged


def test_bad_uploads_are_refused_and_deleted(directory: Path) -> None:
    zeros = hashlib.sha256(bytes(32)).digest()

    def truncated(staged: Staged) -> None:
        staged.finish(32, zeros)

    def inconsistent(staged: Staged) -> None:
        staged.finish(16, hashlib.sha256(bytes(16)).digest())

    def corrupted(staged: Staged) -> None:
        staged.write(bytes(15) + b"\x01")
        staged.finish(32, zeros)

    def too_long(staged: Staged) -> None:
        staged.write(bytes(17))

    cases: list[tuple[Callable[[Staged], None], str]] = [
        (truncated, "16 of 32 bytes"),
        (inconsistent, "announces 16 bytes"),
        (corrupted, "SHA-256"),
        (too_long, "longer than"),
    ]
    with Store(directory, KEY) as store:
        for case, text in cases:
            staged = start(store)
            with pytest.raises(UploadError, match=text):
                case(staged)
            assert list((directory / "staging").iterdir()) == []
            with pytest.raises(ConflictError):
                staged.write(b"")
            with pytest.raises(NotFoundError):
                store.commit(b"request", b"id", 1)
        assert store.deployments() == []


def test_an_unfinished_upload_cannot_be_committed(directory: Path) -> None:
    with Store(directory, KEY) as store:
        start(store)
        with pytest.raises(UploadError, match="not finished"):
            store.commit(b"request", b"id", 1)
        assert list((directory / "staging").iterdir()) == []


def test_discard_is_idempotent_and_frees_the_request_id(directory: Path) -> None:
    with Store(directory, KEY) as store:
        first = start(store)
        with pytest.raises(ConflictError, match="in progress"):
            start(store)
        first.discard()
        second = start(store)
        first.discard()
        assert len(list((directory / "staging").iterdir())) == 1
        second.write(bytes(16))
        second.finish(32, hashlib.sha256(bytes(32)).digest())
        store.commit(b"request", b"id", 1)
        second.discard()
        assert path_of(directory, b"id").exists()


def test_a_deployment_id_is_never_overwritten(directory: Path) -> None:
    with Store(directory, KEY) as store:
        _, payload = deploy(store, fill=1)
        with pytest.raises(ConflictError, match="exists already"):
            deploy(store, fill=2)
        assert read_all(store)[0][1] == payload[:160]
        assert list((directory / "staging").iterdir()) == []


def test_invalid_ids_versions_and_entries_are_refused(directory: Path) -> None:
    with Store(directory, KEY) as store:
        for identifier in (b"", bytes(65)):
            with pytest.raises(InputError, match="64 bytes"):
                store.stage(identifier, METADATA, [])
        for version in (0, 1 << 32):
            with pytest.raises(InputError, match="version"):
                store.commit(b"request", b"id", version)
    with pytest.raises(UploadError, match="negative"):
        WeightEntry("w", (2, -1), 16)
    with pytest.raises(UploadError, match="empty seed"):
        WeightEntry("w", (2,), 16, b"")


def test_parallel_uploads_do_not_disturb_each_other(directory: Path) -> None:
    payloads = {bytes([i]) * 16: os.urandom(8 * 1000) for i in range(6)}

    def run(store: Store, identifier: bytes, payload: bytes) -> None:
        upload(store, [WeightEntry("w", (1000,), 16)], payload, request=identifier, step=100)
        store.commit(identifier, identifier, 1)

    with Store(directory, KEY) as store:
        threads = [threading.Thread(target=run, args=(store, *item)) for item in payloads.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {d.id: read_all(store, d.id)[0][1] for d in store.deployments()} == payloads


# --- crashes and failing disks ----------------------------------------------------------------------------------------

STEPS = ["pwrite", "fsync", "rename", "fsync"]  # of a commit: the seal, the file, the name, the directory


def test_commit_writes_syncs_renames_and_syncs_in_this_order(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order is what makes a power cut harmless: contents before the name, the name before the answer."""
    events: list[tuple[str, object]] = []

    def recorded(name: str) -> None:
        real = getattr(os, name)

        def call(first: int | Path, *rest: object) -> object:
            target = stat.S_IFMT(os.fstat(first).st_mode) if isinstance(first, int) else first.suffix
            events.append((name, target))
            return real(first, *rest)

        monkeypatch.setattr(os, name, call)

    with Store(directory, KEY) as store:
        upload(store, [WeightEntry("w", (1,), 16)], bytes(8))
        for name in set(STEPS):
            recorded(name)
        store.commit(b"request", b"id", 1)
        monkeypatch.undo()
    expected = [("pwrite", stat.S_IFREG), ("fsync", stat.S_IFREG), ("rename", ".part"), ("fsync", stat.S_IFDIR)]
    assert events == expected


CRASHING_DEPLOY = """
import hashlib, os, sys
from pathlib import Path
from mpcinfer.party.store import Store, WeightEntry

steps, crash_before = sys.argv[2].split(","), int(sys.argv[3])
store = Store(Path(sys.argv[1]), bytes(range(32)))
staged = store.stage(b"request", {"name": "digits"}, [WeightEntry("w", (4,), 16)])
staged.write(bytes(range(32)))
staged.finish(32, hashlib.sha256(bytes(range(32))).digest())
done = 0

def crashing(real):
    def call(*args):
        global done
        if done == crash_before:
            os._exit(9)
        done += 1
        return real(*args)
    return call

for name in set(steps):
    setattr(os, name, crashing(getattr(os, name)))
store.commit(b"request", b"id", 7)
os._exit(9 if crash_before == len(steps) else 1)
"""


@pytest.mark.parametrize("crash_before", range(len(STEPS) + 1))
def test_a_process_killed_between_two_steps_of_commit_leaves_all_or_nothing(directory: Path, crash_before: int) -> None:
    command = [sys.executable, "-c", CRASHING_DEPLOY, str(directory), ",".join(STEPS), str(crash_before)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    assert subprocess.run(command, env=environment, timeout=60, check=False).returncode == 9
    renamed = crash_before > STEPS.index("rename")
    assert len(list((directory / "staging").iterdir())) == (0 if renamed else 1)
    with Store(directory, KEY) as store:
        assert list((directory / "staging").iterdir()) == []
        assert store.damaged == {}
        assert [(d.id, d.version, d.metadata) for d in store.deployments()] == (
            [(b"id", 7, {"name": "digits"})] if renamed else []
        )
        if renamed:
            assert read_all(store, b"id")[0][1] == bytes(range(32))


@pytest.mark.parametrize("failing", range(len(STEPS)))
def test_a_step_of_commit_that_fails_leaves_nothing(
    directory: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    calls: list[str] = []

    def fails(name: str, real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object) -> object:
            calls.append(name)
            if len(calls) == failing + 1:
                raise OSError(5, "Input/output error")
            return real(*args)

        return call

    with Store(directory, KEY) as store:
        upload(store, [WeightEntry("w", (1,), 16)], bytes(8))
        for name in set(STEPS):
            monkeypatch.setattr(os, name, fails(name, getattr(os, name)))
        with pytest.raises(StoreError, match="Input/output error"):
            store.commit(b"request", b"id", 1)
        monkeypatch.undo()
        assert calls[: failing + 1] == STEPS[: failing + 1]
        assert store.deployments() == []
        for room in ("staging", "deployments"):
            assert list((directory / room).iterdir()) == []
    with Store(directory, KEY) as store:
        assert (store.deployments(), store.damaged) == ([], {})


def test_a_full_disk_during_the_upload_is_an_error_with_a_remedy(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with Store(directory, KEY) as store:
        staged = start(store)
        staged.write(bytes(16))
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match="No space left on device.*free space"):
            staged.finish(32, hashlib.sha256(bytes(32)).digest())
        assert list((directory / "staging").iterdir()) == []


def test_restart_wipes_staging_and_close_discards(directory: Path) -> None:
    with Store(directory, KEY) as store:
        start(store)
        [part] = (directory / "staging").iterdir()
        contents = part.read_bytes()
    assert not part.exists()
    part.write_bytes(contents)
    with Store(directory, KEY) as store:
        assert not part.exists()
        assert store.deployments() == []


# --- secrecy ----------------------------------------------------------------------------------------------------------


def leaks(directory: Path, canaries: list[bytes]) -> set[bytes]:
    found = set()
    for path in directory.rglob("*"):
        name = path.name.encode()
        contents = path.read_bytes() if path.is_file() else b""
        found |= {canary for canary in canaries if canary in contents or canary in name}
    return found


def test_nothing_of_the_plaintext_reaches_the_disk(directory: Path, tmp_path: Path, small_chunks: None) -> None:
    payload = os.urandom(8 * 200)
    canaries = [payload[i : i + 16] for i in range(0, len(payload), 16)]
    canaries += [b"canary-program-text", b"canary-weight", b"owner/ann", SEED, SEED.hex().encode()]
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "control").write_bytes(payload + b"".join(canaries[100:]))
    assert leaks(plain, canaries) == set(canaries)  # the scanner finds what there is to find

    entries = [WeightEntry("canary-weight", (200,), 16), WeightEntry("seeded", (10, 10), 16, SEED)]
    with Store.open(directory, directory / "key") as store:
        staged = store.stage(b"request", METADATA, entries)
        staged.write(payload[:1000])
        assert leaks(directory, canaries) == set()
        staged.write(payload[1000:])
        staged.finish(len(payload), hashlib.sha256(payload).digest())
        assert leaks(directory, canaries) == set()
        store.commit(b"request", b"id", 1)
        assert path_of(directory, b"id").stat().st_size > len(payload)
        assert leaks(directory, canaries) == set()
        assert read_all(store, b"id")[0][1] == payload
        assert leaks(directory, canaries) == set()


def test_seeds_and_metadata_stay_out_of_representations(directory: Path) -> None:
    with Store(directory, KEY) as store:
        deployment, _ = deploy(store)
        text = repr(deployment) + repr(deployment.weights) + repr(store)
    for secret in (repr(SEED)[2:-1], SEED.hex(), "canary-program-text", repr(KEY), KEY.hex()):
        assert secret not in text


# --- lock, modes, key file --------------------------------------------------------------------------------------------


def test_a_second_store_on_the_same_directory_is_refused(directory: Path) -> None:
    with Store(directory, KEY), pytest.raises(ConflictError, match=f"in use by another process .pid {os.getpid()}"):
        Store(directory, KEY)
    Store(directory, KEY).close()


def test_another_process_holds_the_lock_until_it_dies(directory: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from mpcinfer.party.store import Store\n"
        "store = Store(Path(sys.argv[1]), bytes(32)); print('held', flush=True); sys.stdin.read()"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", program, str(directory)]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ConflictError, match=f"pid {holder.pid}"):
            Store(directory, KEY)
        holder.kill()
    Store(directory, KEY).close()


def test_a_store_that_fails_to_open_lets_go_of_the_lock(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="instead of 32"):
        Store(directory, b"short")
    key_path = tmp_path / "key"
    key_path.write_text("not hex")
    key_path.chmod(0o600)
    with pytest.raises(StoreError, match="64 hex digits"):
        Store.open(directory, key_path)
    Store(directory, KEY).close()


def test_a_closed_store_takes_no_uploads(directory: Path) -> None:
    store = Store(directory, KEY)
    store.close()
    with pytest.raises(ConflictError, match="closed"):
        store.stage(b"request", METADATA, [])
    store.close()


@pytest.fixture
def loose_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def test_files_are_0600_and_directories_0700(directory: Path, tmp_path: Path, loose_umask: None) -> None:
    key_path = tmp_path / "key"
    with Store.open(directory, key_path) as store:
        deploy(store)
        store.stage(b"other", METADATA, [])
        paths = [directory, key_path, *directory.rglob("*")]
        assert len(paths) == 8
        for path in paths:
            assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_a_store_directory_open_to_others_is_refused(directory: Path) -> None:
    Store(directory, KEY).close()
    directory.chmod(0o750)
    with pytest.raises(StoreError, match="chmod 700"):
        Store(directory, KEY)


def test_the_key_file_is_made_once_and_used_again(directory: Path, tmp_path: Path) -> None:
    key_path = tmp_path / "key"
    with Store.open(directory, key_path) as store:
        deploy(store)
    text = key_path.read_text()
    assert len(bytes.fromhex(text)) == 32
    with Store.open(directory, key_path) as store:
        assert len(store.deployments()) == 1
    assert key_path.read_text() == text


def test_a_missing_key_is_not_replaced_once_something_is_committed(directory: Path, tmp_path: Path) -> None:
    key_path = tmp_path / "key"
    with Store.open(directory, key_path) as store:
        deploy(store)
    key_path.rename(tmp_path / "backup")
    with pytest.raises(StoreError, match="missing.*restore the key from a backup"):
        Store.open(directory, key_path)
    assert not key_path.exists()
    (tmp_path / "backup").rename(key_path)
    with Store.open(directory, key_path) as store:
        assert len(store.deployments()) == 1


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o620])
def test_a_key_file_open_to_others_is_refused(directory: Path, tmp_path: Path, mode: int) -> None:
    key_path = tmp_path / "key"
    Store.open(directory, key_path).close()
    key_path.chmod(mode)
    with pytest.raises(StoreError, match="chmod 600"):
        Store.open(directory, key_path)


@pytest.mark.parametrize("text", ["", "00" * 31, "00" * 33, "zz" * 32, "\u00e9" * 32])
def test_a_key_file_without_a_key_is_refused_and_not_quoted(directory: Path, tmp_path: Path, text: str) -> None:
    key_path = tmp_path / "key"
    key_path.write_text(text)
    key_path.chmod(0o600)
    with pytest.raises(StoreError, match="64 hex digits") as caught:
        Store.open(directory, key_path)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    assert not text or text not in str(caught.value)


def test_a_pending_deployment_stays_pending_across_a_restart_until_confirmed(directory: Path) -> None:
    with Store(directory, KEY) as store:
        entries = [WeightEntry("w", (2,), 16)]
        upload(store, entries, b"x" * 16)
        assert store.commit(b"request", b"\x01" * 16, 1, pending=True).pending
        assert not path_of(directory).exists()
    with Store(directory, KEY) as store:
        (found,) = store.deployments()
        assert found.pending
        assert read_all(store) == [(entries[0], b"x" * 16)]
        assert not store.confirm(b"\x01" * 16).pending
        assert store.confirm(b"\x01" * 16) == store.deployments()[0]
        assert read_all(store) == [(entries[0], b"x" * 16)]
    with Store(directory, KEY) as store:
        assert not store.deployments()[0].pending
        with pytest.raises(NotFoundError):
            store.confirm(b"\x02" * 16)


def test_a_pending_deployment_can_be_removed(directory: Path) -> None:
    with Store(directory, KEY) as store:
        upload(store, [WeightEntry("w", (2,), 16)], b"x" * 16)
        store.commit(b"request", b"\x01" * 16, 1, pending=True)
        upload(store, [WeightEntry("w", (2,), 16)], b"y" * 16)
        with pytest.raises(ConflictError):
            store.commit(b"request", b"\x01" * 16, 2)
        store.remove(b"\x01" * 16)
        assert store.deployments() == []
    assert list((directory / "deployments").iterdir()) == list((directory / "staging").iterdir()) == []
