"""Pickles that would execute something, or grow without end, for every test of a file from strangers."""

from __future__ import annotations

import struct


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def attacks(canary: str):
    """Pickle bodies that create the file `canary` when Python's unpickler (or a careless one) reads them."""
    touch = f"touch '{canary}'"
    module, line = "attack_module", f"open({canary!r}, 'w').close()"
    return {
        "reduce": b"cos\nsystem\n" + text(touch) + b"\x85R",
        "reduce by stack": text("posix") + text("system") + b"\x93" + text(touch) + b"\x85R",
        "eval": b"cbuiltins\neval\n" + text(line) + b"\x85R",
        "eval of python 2": b"c__builtin__\neval\n" + text(line) + b"\x85R",
        "exec by an allowed module": b"cnumpy\nf2py\n" + text(line) + b"\x85R",
        "attribute path": text("numpy") + text("os.system") + b"\x93" + text(touch) + b"\x85R",
        "attribute of an allowed name": text("collections") + text("OrderedDict.__class__") + b"\x93)R",
        "getattr": b"cbuiltins\ngetattr\ncos\nsystem\n" + text("x") + b"\x86R",
        "inst": b"(" + text(touch) + b"ios\nsystem\n",
        "obj": b"(cos\nsystem\n" + text(touch) + b"o",
        "newobj": b"csubprocess\nPopen\n" + text(touch) + b"\x85\x81",
        "newobj_ex": b"csubprocess\nPopen\n" + text(touch) + b"\x85}\x92",
        "build": b"ccollections\nOrderedDict\n)R}"
        + text("__setstate__")
        + b"cos\nsystem\nsb"
        + text(touch)
        + b"b",
        "build of a class": b"ccollections\nOrderedDict\n}" + text("__reduce__") + b"NsbN",
        "ext": b"\x82\x01" + text(touch) + b"\x85R",
        "ext2": b"\x83\x01\x00" + text(touch) + b"\x85R",
        "ext4": b"\x84\x01\x00\x00\x00" + text(touch) + b"\x85R",
        "persid": b"Pposix.system\n",
        "binpersid": text(touch) + b"Q",
        "import": f"c{module}\nanything\n".encode(),
        "nested": b"}" + text("a") + b"]}" + text("b") + b"(cos\nsystem\n" + text(touch) + b"\x85Rtsas",
        "pickle in a pickle": b"cpickle\nloads\nC\x04\x80\x04N.\x85R",
        "numpy load": b"cnumpy\nload\n" + text(canary) + b"\x85R",
        "paddle": b"cpaddle.framework.io\nload\n" + text(canary) + b"\x85R",
        "object array": (
            b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R(K\x01K\x01\x85cnumpy\ndtype\n"
            b"X\x02\x00\x00\x00O8\x89\x88\x87R(K\x03X\x01\x00\x00\x00|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK?tb\x89](cos\nsystem\n"
            + text(touch)
            + b"\x85Retb"
        ),
    }


# A list of two of the same list of two of … : 2⁴⁰ leaves from some hundred bytes.
ENDLESS = b"]\x94" + b"".join(b"0](h%ch%ce\x94" % (i, i) for i in range(40))
_ARRAY = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R(K\x01"
_MILLION = _ARRAY + b"J\x00\x00\x10\x00\x85cnumpy\ndtype\n" + text("u1") + b"\x89\x88\x87R(K\x03" + text("|")
_MILLION += b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"


def bombs():
    """Pickle bodies of some KB, one of a megabyte, that promise far more than they hold."""
    data = b"B" + struct.pack("<I", 1 << 20) + bytes(1 << 20) + b"\x940"
    many = b"".join(text(f"w{i}") + _MILLION + b"h\x00tb" for i in range(1000))
    latin = text("latin1")
    letters = text("a" * 60_000) + b"\x940"
    encoded = b"c_codecs\nencode\nh\x00" + latin + b"\x86R"
    return {
        "a name without end": b"cnumpy\ndtype\n" + ENDLESS + b"\x89\x88\x87R",
        "an array of the kind without end": _ARRAY + b"K\x01\x85" + ENDLESS + b"\x89C\x01atb",
        "a shape without end": _ARRAY + ENDLESS + b"N\x89C\x01atb",
        "a call without end": b"c_codecs\nencode\n" + ENDLESS + latin + b"\x86R",
        "a storage without end": b"ccollections\nOrderedDict\n" + ENDLESS + b"\x85R",
        "the same megabyte a thousand times": data + b"}(" + many + b"u",
        "the same text a thousand times": letters + b"](" + encoded * 1000 + b"e",
        "nested without end": b"]" * 20_000 + b"a" * 19_999,
    }
