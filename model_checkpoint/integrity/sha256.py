"""SHA-256 that can note where it stands, so that a part of a file can be verified without the rest.

SHA-256 works through its input 64 bytes at a time, and all that it carries from one block to the next is a state of
32 bytes (FIPS 180-4, section 6.2). The states between the chunks of a file are noted while its digest is computed, and
cost nothing. A chunk is what was saved if it leads from the state before it to the state after it; the last one must
lead to the digest. So chunks are verified alone, or all of them by several threads at once, each as strictly as a file.

hashlib neither tells its state nor starts from one. OpenSSL's libcrypto, from which it takes SHA-256, does both
(``SHA256_CTX`` of <openssl/sha.h>). Where that library is not found, no states are noted, and files are verified whole.
"""

from __future__ import annotations

import ctypes
import hashlib
from functools import cache
from typing import Any

CHUNK = 4 << 20  # 4 MiB: large enough that hashing and writing dwarf the calls, small enough to stay in cache
_NAMES = ("libcrypto.so.3", "libcrypto.so.1.1", "libcrypto.so")


class _Context(ctypes.Structure):
    _fields_ = (
        ("h", ctypes.c_uint32 * 8),
        ("bits_low", ctypes.c_uint32),
        ("bits_high", ctypes.c_uint32),
        ("data", ctypes.c_uint32 * 16),
        ("num", ctypes.c_uint),
        ("md_len", ctypes.c_uint),
    )


class Sha256:
    """A digest in the making. Calls release the GIL for as long as they hash; one thread may use an object at a time.

    Args:
        state: a state noted earlier (64 hex digits), to go on from there; None begins at the beginning.
        position: bytes hashed to that state; a multiple of 64.

    Raises:
        ValueError: ``state`` is none.
        RuntimeError: there is a ``state``, but no libcrypto (see ``can_resume``).
    """

    def __init__(self, state: str | None = None, position: int = 0) -> None:
        library = _libcrypto()
        self._library = library
        self._plain = None
        if library is None:
            if state is not None:
                raise RuntimeError("without libcrypto, SHA-256 cannot go on from a state")
            self._plain = hashlib.sha256()
            return
        self._context = _Context()
        library.SHA256_Init(self._context)
        if state is not None:
            words = bytes.fromhex(state)
            if len(words) != 32:
                raise ValueError(f"a state of SHA-256 has 64 hex digits, not {state!r}")
            self._context.h[:] = [int.from_bytes(words[i : i + 4], "big") for i in range(0, 32, 4)]
            self._context.bits_low = position * 8 & 0xFFFFFFFF
            self._context.bits_high = position * 8 >> 32

    def update(self, data: memoryview) -> None:
        """Hash ``data``, flat bytes in writable memory; it is only read."""
        if self._plain is not None:
            self._plain.update(data)
        elif data.nbytes:
            first = ctypes.c_char.from_buffer(data)
            self._library.SHA256_Update(self._context, ctypes.byref(first), data.nbytes)

    def state(self) -> str | None:
        """Return the state (64 hex digits) after a multiple of 64 bytes; None where there is no libcrypto."""
        if self._plain is not None:
            return None
        return b"".join(word.to_bytes(4, "big") for word in self._context.h).hex()

    def hexdigest(self) -> str:
        """Return the SHA-256 of all that was hashed; nothing can be hashed after that."""
        if self._plain is not None:
            return self._plain.hexdigest()
        digest = ctypes.create_string_buffer(32)
        self._library.SHA256_Final(digest, self._context)
        return digest.raw.hex()


def can_resume() -> bool:
    """Whether ``Sha256`` can tell its state and go on from one here."""
    return _libcrypto() is not None


@cache
def _libcrypto() -> Any:
    """Return the library, or None where it is not there or does not do what hashlib does."""
    for name in _NAMES:
        try:
            library = ctypes.CDLL(name)
            for verb, arguments in (
                ("SHA256_Init", (ctypes.POINTER(_Context),)),
                ("SHA256_Update", (ctypes.POINTER(_Context), ctypes.c_void_p, ctypes.c_size_t)),
                ("SHA256_Final", (ctypes.c_char_p, ctypes.POINTER(_Context))),
            ):
                getattr(library, verb).argtypes = arguments
        except (OSError, AttributeError):
            continue
        if _agrees(library):
            return library
    return None


def _agrees(library: Any) -> bool:
    """Whether the library's context is laid out as we think: hash two blocks, the second from a bare state."""
    text = bytes(range(256))
    whole, resumed, digest = _Context(), _Context(), ctypes.create_string_buffer(32)
    library.SHA256_Init(whole)
    library.SHA256_Update(whole, text, 128)
    library.SHA256_Init(resumed)
    resumed.h[:], resumed.bits_low = whole.h, 128 * 8
    library.SHA256_Update(resumed, text[128:], 128)
    library.SHA256_Final(digest, resumed)
    return digest.raw == hashlib.sha256(text).digest()
