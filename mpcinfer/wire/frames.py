"""How messages are cut into frames, and how many bytes that makes of them: what a run counts can be said before it."""

from __future__ import annotations

import struct

CHUNK = 1 << 20  # payload of one frame at most
GRPC_HEADER = 5  # length prefix of a gRPC message
HEADER = struct.Struct(">BI")  # that: not compressed, length
_MOST_HEAD = 32  # bytes before a payload, at most
COMPARED = 32  # what the parties compare at the end of a run: an HMAC of all that was opened


def round_bytes(size: int) -> int:
    """What one peer is sent in a round in which `size` bytes are opened, headers included (see mesh.proto)."""
    # fields 1 (fixed64), 2 (one byte) and, but in the last frame, 3 (one byte), each after a byte for its tag
    return sum(_wrapped(9 + 2 + 2 * more + _size_of_field(part)) for part, more in _parts(size))


def dealt_bytes(size: int) -> int:
    """What the dealer sends for corrections of `size` bytes, headers included (see dealer.proto); 0 for none."""
    return sum(chunk_bytes(part) for part, _ in _parts(size) if part)


def chunk_bytes(size: int) -> int:
    """A message with a chunk of so many bytes and nothing else, header included (see dealer.proto).

    Asking the message would make it write all of itself.
    """
    return GRPC_HEADER + _size_of_field(size)


def head(sequence: int, kind: int, more: bool, size: int) -> bytes:
    """What comes before a frame's payload of so many bytes, header included (see mesh.proto), for sequence > 0.

    As protobuf writes it, which would copy the payload several times.
    """
    fields = b"\x09" + sequence.to_bytes(8, "little") + bytes([0x10, kind]) + (b"\x18\x01" if more else b"")
    fields += field_head(4, size)
    frame = field_head(1, len(fields) + size) + fields
    return HEADER.pack(0, len(frame) + size) + frame


def payload(message: memoryview, sequence: int, kind: int) -> tuple[memoryview, bool]:
    """The payload of a frame whose message follows its header, and whether more follow; ValueError if it is another."""
    raw = bytes(message[:_MOST_HEAD])
    at = _varint_end(raw, 1) + 9 + 2
    more = raw[at : at + 2] == b"\x18\x01"
    at += 2 * more
    if at < len(message):
        at = _varint_end(raw, at + 1)
    size = len(message) - at
    if size < 0 or more and size != CHUNK or raw[:at] != head(sequence, kind, more, size)[GRPC_HEADER:]:
        raise ValueError("another frame")
    return message[at:], more


def field_head(number: int, size: int) -> bytes:
    """What comes before the content of a field of that number, of so many bytes; nothing if it is empty."""
    return bytes([number << 3 | 2]) + _varint(size) if size else b""


def content(number: int, message: memoryview) -> memoryview | None:
    """The content of a message that is a field of bytes of that number, written as above, and nothing else."""
    raw = bytes(message[:_MOST_HEAD])
    found = message[_varint_end(raw, 1) :]
    return found if found and raw.startswith(field_head(number, len(found))) else None


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def _varint_end(raw: bytes, at: int) -> int:
    while raw[at : at + 1] > b"\x7f":
        at += 1
    return at + 1


def _parts(size: int) -> list[tuple[int, bool]]:
    """The payloads of the frames of a message, and whether more follow; one frame at least."""
    frames = max(1, -(-size // CHUNK))
    return [(min(CHUNK, size - i * CHUNK), i < frames - 1) for i in range(frames)]


def _wrapped(frame: int) -> int:
    return GRPC_HEADER + _size_of_field(frame)


def _size_of_field(size: int) -> int:
    """A field of bytes or a message: tag, length, content; nothing if it is empty."""
    return 1 + (max(1, size.bit_length()) + 6) // 7 + size if size else 0
