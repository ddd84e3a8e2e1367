"""What every adapter turns its arrays into, and back: plain host memory with a name for its element type."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple, Protocol


class Layout(NamedTuple):
    """Where an array lies in memory, to find arrays that share it; strides count elements and are never negative.

    Attributes:
        device: whose address space ``address`` is in, such as ``cpu`` or ``cuda:0``.
        address: of the first element, in bytes.
        dtype, shape: as in ``HostArray``.
        strides: elements from one index to the next, for each dimension.
    """

    device: str
    address: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class HostArray(NamedTuple):
    """An array in host memory.

    Attributes:
        dtype: a name of ``arrays.dtypes.DTYPES``.
        shape: its dimensions, outermost first; ``()`` is a scalar.
        data: flat bytes (format ``B``), C order, little-endian, ``nbytes`` = elements x element size.
            A view where the library allows: it borrows the array's memory and keeps it alive, and must not be
            used after the array is changed.
        kind: what to make of it when loading, such as ``torch``, ``numpy``, ``bytes`` or ``array:f``.
        identity: equal for two arrays that are one (tied): a ``Layout``, or an object's id; None if never tied.
        source: the library's own array in host memory, for backends that store it natively; else None.
        immutable: whether nobody else can ever change ``data``, be it of an immutable object or a copy that was made
            just now: a snapshot need not copy it again.
    """

    dtype: str
    shape: tuple[int, ...]
    data: memoryview
    kind: str
    identity: Hashable = None
    source: object = None
    immutable: bool = False


class ArrayAdapter(Protocol):
    """The verbs, the same for every array library; each adapter is one module of this folder."""

    def to_host(self, value: object) -> HostArray | None:
        """Return ``value`` as host memory, zero-copy where possible; None when it is no array of this library.

        Raises:
            ValueError: it is an array that cannot be stored; the text says why and what to do.
        """

    def describe(self, value: object) -> HostArray | None:
        """Return what ``to_host`` returns, but copy nothing: where it might have to, ``data`` is empty.

        ``identity`` is a ``Layout`` also of an array that ``to_host`` must turn round or resolve: where it lies, with
        the strides of its elements in the order of their addresses.

        Raises:
            ValueError: as from ``to_host``.
        """

    def settle(self) -> None:
        """Wait until copies from devices that ``to_host`` has begun are whole; their ``data`` is not before that."""

    def from_host(self, array: HostArray, device: object = None) -> object:
        """Make the library's array from ``array``, sharing its memory where possible; the caller owns the result.

        Args:
            array: the array to convert, its ``kind`` one that this adapter wrote.
            device: where to put it, in the library's own words; None leaves it in host memory.

        Raises:
            MissingDependencyError: the library, or one that it needs for this dtype, is not installed.
            ConfigurationError: the device cannot be used.
        """

    def fill(self, target: object, array: HostArray) -> None:
        """Copy the values of ``array`` into ``target``, an array of this library with the same dtype and shape.

        Raises:
            ValueError: it cannot be written.
        """

    def touched(self, target: object) -> None:
        """Note that the memory of ``target`` was written without its library, which may count its changes."""

    def view(self, base: object, layout: Layout, offset: int) -> object:
        """Return the part of ``base`` (one of this library's 1-D arrays) that ``layout`` describes, sharing its memory.

        Args:
            base: what ``from_host`` made.
            layout: shape and strides of the part; its address and device are not looked at.
            offset: elements from the start of ``base`` to the part's first element.
        """
