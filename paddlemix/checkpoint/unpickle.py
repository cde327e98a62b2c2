"""A small pickle interpreter that reads weights and can do nothing else.

Python's own unpickler calls whatever a file names. Here global names become symbols, and the few that weights need map
to functions of ours (see pdparams and torch_bin); any other name is refused before anything happens. Byte strings are
not copied: they become (offset, length) in the mapped file, so that opening a 10 GB file costs only its opcodes.

Files beyond these limits are refused: MAX_OPCODES instructions, containers nested deeper than Python's recursion limit,
integers over 64 bytes, dictionary keys other than strings and integers below MAX_KEY, and duplicate keys.
"""

from __future__ import annotations

import pickletools
import struct
from typing import Any, Callable, Dict, List, Optional, Tuple

from paddlemix.checkpoint.tensors import MAX_NAME
from paddlemix.utils.errors import WeightsError
from paddlemix.utils.texts import one_line

# A 7B checkpoint has about 30,000, the state of its optimizer some 100,000.
MAX_OPCODES = 5_000_000
# Strings are hashed with a secret, integers by value: a dictionary of large integers that collide takes quadratic time
# (minutes for 60,000 of them).
MAX_KEY = 1 << 16
# Longer strings are decoded on demand (numpy data of pickle protocol 2 is a string).
_LAZY_TEXT = 1 << 16


class Blob:
    """Bytes that lie in the file."""

    __slots__ = ("offset", "length")

    def __init__(self, offset: int, length: int):
        self.offset = offset
        self.length = length


class LazyText(Blob):
    """A long UTF-8 string that lies in the file."""

    __slots__ = ()


class Symbol:
    """A global name in the file, never resolved."""

    __slots__ = ("module", "name")

    def __init__(self, module: str, name: str):
        self.module = module
        self.name = name

    def __str__(self) -> str:
        return one_line(f"{self.module}.{self.name}")


# Separates the items of a container on the stack.
_MARK = object()

Handler = Callable[..., Any]


class Unpickler:
    """Reads one pickle from `view[start:stop]`; returns plain objects, Blobs, and the results of the handlers.

    calls: (module, name) → function of ours, called with the file's arguments to that name.
    names: (module, name) → our object for a name that the file only passes on.
    persistent: maps a persistent id (torch's references to its storages); None refuses them.

    Raises:
        WeightsError: in one line that names the file; nothing the file names was run. Its code is "refused" for
        content that weights do not need, "broken" for any other fault.
    """

    def __init__(
        self,
        view: memoryview,
        path: str,
        calls: Dict[Tuple[str, str], Handler],
        names: Optional[Dict[Tuple[str, str], Any]] = None,
        persistent: Optional[Callable[[Any], Any]] = None,
        start: int = 0,
        stop: Optional[int] = None,
    ):
        self._view = view
        self._path = path
        self._calls = calls
        self._names = names or {}
        self._persistent = persistent
        self._at = start
        self._stop = len(view) if stop is None else stop
        self._stack: List[Any] = []
        self._memo: Dict[int, Any] = {}

    # ---- reading

    def load(self) -> Any:
        start = self._at
        try:
            return self._run()
        except WeightsError as error:
            raise WeightsError(f"{self._path}: {error}", *(error.about or ("broken",))) from None
        except RecursionError:
            raise WeightsError(f"{self._path}: nested too deeply", "too-deep") from None
        except (IndexError, KeyError, TypeError, ValueError, AttributeError, struct.error) as error:
            # The handlers unpack untrusted arguments, so a broken file can raise any of these.
            detail = one_line(f"{type(error).__name__} at byte {self._at}")
            kind = "is not a weights file" if self._at - start < 16 else "is broken"
            raise WeightsError(f"{self._path} {kind} ({detail})", "broken") from None

    def _run(self) -> Any:
        if self._take(1) != b"\x80":
            raise WeightsError("not a .pdparams or .bin file (no pickle of protocol 2 or later)", "protocol")
        protocol = self._take(1)[0]
        if not 2 <= protocol <= 5:
            raise WeightsError(f"unknown pickle protocol {protocol}", "protocol")
        table = self._TABLE
        for _ in range(MAX_OPCODES):
            opcode = self._take(1)
            if opcode == b".":
                if len(self._stack) != 1:
                    raise WeightsError("broken: objects are left over at its end")
                if self._at != self._stop:
                    raise WeightsError(f"{self._stop - self._at} bytes follow its end", "trailing-bytes")
                return self._stack.pop()
            step = table.get(opcode)
            if step is None:
                raise _refused_opcode(opcode)
            step(self)
        raise WeightsError(f"refused: more than {MAX_OPCODES:,} pickle instructions", "refused")

    def _take(self, n: int) -> bytes:
        end = self._at + n
        if end > self._stop:
            raise WeightsError("ends too early", "truncated")
        data = self._view[self._at : end].tobytes()
        self._at = end
        return data

    def _skip(self, n: int) -> int:
        """Skip n bytes of payload; returns their offset."""
        start = self._at
        if n < 0 or start + n > self._stop:
            raise WeightsError("ends too early: it declares more bytes than it holds", "truncated")
        self._at = start + n
        return start

    def _line(self) -> str:
        """A string that ends with a newline (names of the old GLOBAL instruction)."""
        piece = self._view[self._at : min(self._at + MAX_NAME, self._stop)].tobytes()
        text, newline, _ = piece.partition(b"\n")
        if not newline:
            raise WeightsError("broken: a name without end")
        self._at += len(text) + 1
        return text.decode("utf-8")

    def _number(self, code: str) -> int:
        return struct.unpack(code, self._take(struct.calcsize(code)))[0]

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise WeightsError("broken: a mark where a value should be")
        return value

    def _pop_to_mark(self) -> List[Any]:
        stack = self._stack
        at = len(stack) - 1
        while stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise WeightsError("broken: no mark on the stack")
        items = stack[at + 1 :]
        del stack[at:]
        return items

    # ---- values

    def _long(self, n: int) -> None:
        if not 0 <= n <= 64:
            raise WeightsError("refused: an integer of more than 64 bytes", "refused")
        self._push(int.from_bytes(self._take(n), "little", signed=True))

    def _text(self, n: int) -> None:
        start = self._skip(n)
        if n > _LAZY_TEXT:
            self._push(LazyText(start, n))
        else:
            self._push(str(self._view[start : start + n], "utf-8", "surrogatepass"))

    def _bytes(self, n: int) -> None:
        self._push(Blob(self._skip(n), n))

    def _tuple(self, n: int) -> None:
        items = [self._pop() for _ in range(n)]
        self._push(tuple(reversed(items)))

    # ---- containers

    def _target(self, kind: type) -> Any:
        target = self._stack[-1]
        if type(target) is not kind:
            raise WeightsError(f"broken: items for a {kind.__name__} added to another type")
        return target

    def _append(self) -> None:
        item = self._pop()
        self._target(list).append(item)

    def _appends(self) -> None:
        items = self._pop_to_mark()
        self._target(list).extend(items)

    def _set(self, items: List[Any]) -> None:
        target = self._target(dict)
        if len(items) % 2:
            raise WeightsError("broken: a key without a value")
        for key, value in zip(items[::2], items[1::2]):
            # Nested tuples could take hours to hash.
            if type(key) not in (str, int):
                raise WeightsError("refused: a dictionary key that is neither a string nor an integer", "refused")
            if type(key) is int and not -MAX_KEY < key < MAX_KEY:
                raise WeightsError(f"refused: a dictionary key that is a number beyond {MAX_KEY:,}", "refused")
            if key in target:
                raise WeightsError(f"the key {one_line(str(key))} is in it twice", "duplicate")
            target[key] = value

    def _set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self._set([key, value])

    # ---- memory

    def _get(self, index: int) -> None:
        if index not in self._memo:
            raise WeightsError("broken: a reference to an object that was not stored")
        self._push(self._memo[index])

    def _put(self, index: int) -> None:
        if self._stack[-1] is _MARK:
            raise WeightsError("broken: a mark where a value should be")
        self._memo[index] = self._stack[-1]

    # ---- names and calls

    def _global(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise WeightsError("broken: a name that is not a string")
        symbol = Symbol(module, name)
        if (module, name) in self._names:
            self._push(self._names[module, name])
            return
        if (module, name) not in self._calls:
            text = f"refused: it uses {symbol}, which weights do not need; nothing was run"
            raise WeightsError(text, "refused", str(symbol))
        self._push(symbol)

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        self._global(module, name)

    def _handler(self, symbol: Any) -> Handler:
        if type(symbol) is not Symbol:
            raise WeightsError("broken: a call of something that is not a name")
        handler = self._calls.get((symbol.module, symbol.name))
        if handler is None:
            text = f"refused: it calls {symbol}, which weights do not need; nothing was run"
            raise WeightsError(text, "refused", str(symbol))
        return handler

    def _reduce(self) -> None:
        arguments, symbol = self._pop(), self._pop()
        if type(arguments) is not tuple:
            raise WeightsError("broken: a call without arguments")
        self._push(self._handler(symbol)(*arguments))

    def _build(self) -> None:
        state = self._pop()
        target = self._stack[-1]
        # Attributes of an OrderedDict (torch's _metadata) are not weights.
        if type(target) is dict:
            return
        if not isinstance(target, Buildable):
            raise WeightsError("refused: it sets the state of something that has none", "refused")
        target.build(state)

    def _persistent_id(self) -> None:
        if self._persistent is None:
            raise _refused_opcode(b"Q")
        self._push(self._persistent(self._pop()))

    _TABLE = {
        b"\x80": lambda self: self._take(1),
        b"\x95": lambda self: self._take(8),
        b"(": lambda self: self._push(_MARK),
        b"0": lambda self: self._stack.pop(),
        b"1": lambda self: self._pop_to_mark(),
        b"N": lambda self: self._push(None),
        b"\x88": lambda self: self._push(True),
        b"\x89": lambda self: self._push(False),
        b"J": lambda self: self._push(self._number("<i")),
        b"K": lambda self: self._push(self._number("<B")),
        b"M": lambda self: self._push(self._number("<H")),
        b"\x8a": lambda self: self._long(self._number("<B")),
        b"\x8b": lambda self: self._long(self._number("<i")),
        b"G": lambda self: self._push(self._number(">d")),
        b"X": lambda self: self._text(self._number("<I")),
        b"\x8c": lambda self: self._text(self._number("<B")),
        b"\x8d": lambda self: self._text(self._number("<Q")),
        b"B": lambda self: self._bytes(self._number("<I")),
        b"C": lambda self: self._bytes(self._number("<B")),
        b"\x8e": lambda self: self._bytes(self._number("<Q")),
        b")": lambda self: self._push(()),
        b"t": lambda self: self._push(tuple(self._pop_to_mark())),
        b"\x85": lambda self: self._tuple(1),
        b"\x86": lambda self: self._tuple(2),
        b"\x87": lambda self: self._tuple(3),
        b"]": lambda self: self._push([]),
        b"a": lambda self: self._append(),
        b"e": lambda self: self._appends(),
        b"}": lambda self: self._push({}),
        b"s": lambda self: self._set_item(),
        b"u": lambda self: self._set(self._pop_to_mark()),
        b"q": lambda self: self._put(self._number("<B")),
        b"r": lambda self: self._put(self._number("<I")),
        b"\x94": lambda self: self._put(len(self._memo)),
        b"h": lambda self: self._get(self._number("<B")),
        b"j": lambda self: self._get(self._number("<I")),
        b"c": lambda self: self._global(self._line(), self._line()),
        b"\x93": lambda self: self._stack_global(),
        b"R": lambda self: self._reduce(),
        b"b": lambda self: self._build(),
        b"Q": lambda self: self._persistent_id(),
    }


def _refused_opcode(opcode: bytes) -> WeightsError:
    known = pickletools.code2op.get(opcode.decode("latin1"))
    name = known.name if known else f"byte {opcode.hex()}"
    return WeightsError(f"refused: the pickle instruction {name}, which weights do not need", "refused", name)


class Buildable:
    """An object made by a handler whose state is set afterwards."""

    def build(self, state: Any) -> None:
        raise NotImplementedError


def make_dict(*arguments: Any) -> dict:
    """collections.OrderedDict(), which a pickle fills afterwards."""
    if arguments:
        raise WeightsError("refused: an OrderedDict made from arguments", "refused")
    return {}
