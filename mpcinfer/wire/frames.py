"""How messages are cut into frames, and how many bytes that makes of them: what a run counts can be said before it."""

from __future__ import annotations

CHUNK = 1 << 20  # payload of one frame at most
GRPC_HEADER = 5  # length prefix of a gRPC message
COMPARED = 32  # what the parties compare at the end of a run: an HMAC of all that was opened


def round_bytes(size: int) -> int:
    """What one peer is sent in a round in which `size` bytes are opened, headers included (see mesh.proto)."""
    # fields 1 (fixed64), 2 (one byte) and, but in the last frame, 3 (one byte), each after a byte for its tag
    return sum(_wrapped(9 + 2 + 2 * more + _bytes_field(part)) for part, more in _parts(size))


def dealt_bytes(size: int) -> int:
    """What the dealer sends for corrections of `size` bytes, headers included (see dealer.proto); 0 for none."""
    return sum(chunk_bytes(part) for part, _ in _parts(size) if part)


def chunk_bytes(size: int) -> int:
    """A message with a chunk of so many bytes and nothing else, header included (see dealer.proto).

    Asking the message would make it write all of itself.
    """
    return GRPC_HEADER + _bytes_field(size)


def _parts(size: int) -> list[tuple[int, bool]]:
    """The payloads of the frames of a message, and whether more follow; one frame at least."""
    frames = max(1, -(-size // CHUNK))
    return [(min(CHUNK, size - i * CHUNK), i < frames - 1) for i in range(frames)]


def _wrapped(frame: int) -> int:
    return GRPC_HEADER + _bytes_field(frame)


def _bytes_field(size: int) -> int:
    """A field of bytes or a message: tag, length, content; nothing if it is empty."""
    return 1 + (max(1, size.bit_length()) + 6) // 7 + size if size else 0
