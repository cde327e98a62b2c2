"""Whatever a stranger's file holds: a result or an error in one line.

The cases are the same in every run; `make fuzz` draws new ones, and many more (FUZZ_EXAMPLES). See docs/security.md.
"""

import base64
import json
import os
import pickle
import resource
import struct
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.checkpoint.files import arrays, entry, safetensors_bytes, torch_file
from tests.fuzz import targets
from tests.fuzz.targets import GENERATION, IMAGE, LORA, RECORD, RUN, TEMPLATE, VOCABULARY
from tests.helpers import image_bytes, tiny_config
from tests.pickles import attacks, text

pytestmark = pytest.mark.slow

FUZZ = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "150")),
    deadline=None,
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    # No folder .hypothesis where the tests are run.
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
# No case needs more memory than this beside what the tests and Paddle take, bytes.
MOST_MEMORY = 500 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder that all cases share: each overwrites the files of the one before it."""
    return str(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(scope="module", autouse=True)
def memory():
    """ru_maxrss counts kilobytes."""
    import paddlemix.models.mgen_vl.configuration  # noqa: F401 - what it takes is not the cases'
    import paddlemix.trainer.command_line  # noqa: F401

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before < MOST_MEMORY


# ---- what is drawn

NUMBERS = st.integers(-3, 300) | st.sampled_from([2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, 10**30, -(2**63)])
# Bytes set, put in and taken out, and numbers of 2, 4 and 8 bytes written over.
EDITS = st.lists(
    st.tuples(st.integers(0, 1 << 16), st.integers(0, 255), st.sampled_from("sid"))
    | st.tuples(st.integers(0, 1 << 16), NUMBERS, st.sampled_from("248")),
    max_size=6,
)


def edited(data: bytes, edits) -> bytes:
    data = bytearray(data)
    for at, value, kind in edits:
        at %= len(data) + 1
        if kind == "s":
            data[at : at + 1] = bytes([value])
        elif kind == "i":
            data[at:at] = bytes([value])
        elif kind == "d":
            del data[at : at + value]
        else:
            width = int(kind)
            data[at : at + width] = (value % 256**width).to_bytes(width, "little")
    return bytes(data)


# Drawn from a table, as values made by rule take ten times as long.
_NUMBERS = [0, 1, -1, 2, 3, 7, 64, 1000, 10**9, 2**31, 2**63, -(2**63), 2**64, 10**19, 10**30]
_FRACTIONS = [0.0, 0.5, -0.0, 1e-300, 1e300, float("nan"), float("inf"), -float("inf")]
_TEXTS = ["", "a", "F32", "1", "true", "../x", "/etc/passwd", "a\0b", "a\nb", "\x1b[31m", "\ud800", "图", "x" * 3000]
_TEXTS += ["(a+)+$", "(", "[", "*", "**/*", "{{user}}", "<img>"]
_LISTS = [[], [0], [1, 2], [-1], [2**40, 2**40], [0.5], [""], ["a"], ["a", "a"], [None], [[]], [["a", "b"]], [["a", 1]]]
_OBJECTS = [{}, {"a": 1}, {"": {}}, {"file": "x", "offset": 0, "length": 1}, {"a": [[{"b": [[{}]]}]]}]
_OBJECTS += [{"train": entries} for entries in ([], [{}], [[]], [{"name": "chatml_dataset", "data_files": ["x"] * 3}])]
JSON = st.sampled_from([None, True, False, *_NUMBERS, *_FRACTIONS, *_TEXTS, *_LISTS, *_OBJECTS])
_KEYS = ["", "a", "b", "w", "\n", "\0", "\ud800", "é", "x" * 2000, "__metadata__", "__class__", "self", "from_dict"]
NAMES = st.sampled_from(_KEYS)


def changed(values: dict, names):
    """`values` with some of `names` given another value, as JSON text, perhaps damaged."""
    changes = st.dictionaries(st.sampled_from(sorted(names)) | NAMES, JSON, max_size=3)
    documents = st.builds(lambda new: json.dumps({**values, **new}).encode("utf-8", "surrogatepass"), changes)
    return documents | st.builds(edited, documents, EDITS)


# ---- weights

PICKLES = [pickle.dumps({name: array for name, (_, array) in arrays().items()}, protocol) for protocol in (2, 3, 4, 5)]
ATTACKS = [b"\x80\x04}(" + text("w") + attack + b"u." for attack in attacks("canary").values()]


@FUZZ
@given(data=st.builds(edited, st.sampled_from([*PICKLES, *ATTACKS]), EDITS))
def test_pdparams(folder, data):
    targets.weights(data, ".pdparams", folder)
    assert not os.path.exists("canary")


INSTRUCTIONS = [bytes([i]) for i in range(256)] + [
    text("w"), b"cnumpy\ndtype\n", b"cnumpy\nndarray\n", b"cnumpy.core.multiarray\n_reconstruct\n", b"K\x00\x85",
    b"ccollections\nOrderedDict\n)R", b"c_codecs\nencode\n" + text("ab") + text("latin1") + b"\x86R", b"\x94", b"h\x00",
    text("UnpackBigParamInfor@@"),
]  # fmt: skip


@FUZZ
@given(data=st.lists(st.sampled_from(INSTRUCTIONS), max_size=40))
def test_pickle_instructions(folder, data):
    targets.weights(b"\x80\x04" + b"".join(data) + b".", ".pdparams", folder)


@pytest.fixture(scope="module")
def torch_bytes(folder):
    with open(torch_file(os.path.join(folder, "good.bin"), arrays()), "rb") as file:
        return file.read()


@FUZZ
@given(edits=EDITS)
def test_torch(folder, torch_bytes, edits):
    targets.weights(edited(torch_bytes, edits), ".bin", folder)


HEADER = {
    "__metadata__": {"format": "np"},
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]},
}
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I8", "F8_E5M2"]) | JSON,
        "shape": st.lists(NUMBERS, max_size=3) | JSON,
        "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2) | JSON,
    }
)


@FUZZ
@given(data=st.builds(edited, st.just(safetensors_bytes(HEADER, bytes(22))), EDITS))
def test_safetensors(folder, data):
    targets.weights(data, ".safetensors", folder)


@FUZZ
@given(header=st.dictionaries(NAMES, ENTRY | JSON, max_size=3), size=st.integers(0, 40))
def test_safetensors_headers(folder, header, size):
    targets.weights(safetensors_bytes(header, bytes(size)), ".safetensors", folder)
    good = dict(header, good=entry("U8", [size], 0, size))
    targets.weights(safetensors_bytes(good, bytes(size)), ".safetensors", folder)


@FUZZ
@given(data=changed({"weight_map": {"a": "model_state-00001-of-00002.pdparams"}}, ["weight_map"]) | st.builds(
    lambda table: json.dumps({"weight_map": table}).encode(), st.dictionaries(NAMES, NAMES | JSON, max_size=3)
))  # fmt: skip
def test_indexes(tmp_path_factory, data):
    empty = tmp_path_factory.getbasetemp() / "indexed"
    empty.mkdir(exist_ok=True)
    targets.index(data, str(empty))


# ---- configurations

@FUZZ
@given(data=changed(LORA, LORA))
def test_lora_configs(folder, data):
    targets.lora_config(data, folder)
    targets.json_object(data, folder)


def model_configs():
    values = tiny_config().to_dict()
    visual = values["visual"]
    changes = st.dictionaries(st.sampled_from(sorted(visual)), JSON | NUMBERS, max_size=3)
    return changed(values, values) | st.builds(
        lambda new: json.dumps(dict(values, visual=dict(visual, **new))).encode("utf-8", "surrogatepass"), changes
    )


@FUZZ
@given(data=st.deferred(model_configs))
def test_model_configs(folder, data):
    targets.model(data, folder)
    targets.model_config(data, folder)


@FUZZ
@given(data=changed(GENERATION, [*GENERATION, "decode_strategy", "num_beams", "temperature", "max_window_size"]))
def test_generation_configs(folder, data):
    targets.generation_config(data, folder)


@FUZZ
@given(data=changed(TEMPLATE, TEMPLATE))
def test_chat_templates(folder, data):
    targets.chat_template(data, folder)


@FUZZ
@given(edits=EDITS)
def test_vocabularies(folder, edits):
    targets.vocabulary(edited(VOCABULARY, edits), folder)


def known_keys():
    from paddlemix.trainer.keys import REFUSED, known_keys

    return sorted([*known_keys(), *REFUSED])


@FUZZ
@given(data=st.deferred(lambda: changed(RUN, known_keys())))
def test_run_configs(folder, data):
    targets.run_config(data, folder)


# ---- data

PIECES = st.sampled_from(
    [b"\t", b"\n", b"\r\n", b" ", b"id", b"\xff", b"\xef\xbb\xbf", b"/9j/", IMAGE, b"=", b"\0", b"a" * 5000]
)


@FUZZ
@given(data=st.lists(PIECES | st.binary(max_size=8), max_size=30).map(b"".join))
def test_tsv_rows(folder, data):
    targets.tsv_rows(data, folder)


CELLS = st.sampled_from(
    [b",", b"\n", b"\r", b'"', b'""', b"\t", b"a.png", b"../a.png", b"a.png\0", b"gone.jpg", b"http://a/b.png"]
)


@FUZZ
@given(
    header=st.sampled_from([b"image,caption\n", b"\xef\xbb\xbfid,caption,file_name\r\n", b'"path"\n', b""]),
    data=st.lists(CELLS | PIECES | st.binary(max_size=8), max_size=30).map(b"".join),
)
def test_tables_in_a_folder_of_images(folder, header, data):
    targets.put(folder, "a.png", base64.b64decode(IMAGE))
    targets.table(header + data, folder)


@FUZZ
@given(data=st.builds(edited, st.sampled_from(targets.archives()), EDITS))
def test_archives(folder, data):
    targets.archive(data, folder)


REFERENCE = {"file": "../../etc/passwd", "offset": 0, "length": 10}


@FUZZ
@given(
    values=st.lists(
        changed(RECORD, RECORD) | changed(dict(RECORD, image=REFERENCE), RECORD) | st.binary(max_size=9), max_size=3
    ),
    between=st.sampled_from([b",\n", b",", b"\n", b"\n  "]),
    around=st.sampled_from([(b"[", b"]"), (b"[\n", b"\n]"), (b"", b"")]),
)
def test_records(folder, values, between, around):
    targets.records(around[0] + between.join(values) + around[1], folder)


@FUZZ
@given(text=st.text(max_size=40) | st.text("<img>/ \t", max_size=60))
def test_prompts_with_images(folder, text):
    prompt = "<img>" + text + "</img>" + text
    targets.records(json.dumps(dict(RECORD, conversations=[[prompt, "a"]])).encode(), folder)


# ---- images

# Also a run-length encoded BMP of 2 × 1 pixels, and one that jumps far out of its picture.
RUN_LENGTHS = [
    b"BM" + struct.pack("<IHHIIiiHHIIiiII", 1082, 0, 0, 1078, 40, 2, 1, 1, 8, 1, 4, 0, 0, 256, 0) + bytes(1024) + body
    for body in (b"\2\1\0\1", b"\0\2\xff\xff")
]
FORMATS = RUN_LENGTHS + [image_bytes(size=(12, 9), format=format) for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP")]


@FUZZ
@given(data=st.builds(edited, st.sampled_from(FORMATS), EDITS))
def test_images(data):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow tells what it makes of broken files
        targets.image(data)


@FUZZ
@given(data=st.binary(max_size=60) | st.builds(edited, st.just(b"data:image/png;base64," + IMAGE), EDITS))
def test_base64(data):
    targets.base64_image(data)


def test_the_promise_is_looked_at(folder):
    """A target that cannot fail would show nothing."""
    broken = np.zeros(3)
    with pytest.raises(AssertionError), targets.only(ValueError):
        raise ValueError("two\nlines")
    with pytest.raises(KeyError), targets.only(ValueError):
        raise KeyError(broken.shape)
