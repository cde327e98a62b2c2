"""chat.py: questions about images, in one go and in turns."""

import http.server
import re
import signal
import subprocess
import sys
import threading

import pytest

import chat
from paddlemix.utils import cli
from tests.helpers import image_base64, image_bytes
from tests.inference.talking import save_talking_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_talking_model(tmp_path_factory.mktemp("weights") / "tiny model", seed=5)


@pytest.fixture
def call(model, monkeypatch, capsys):
    """call(*arguments) → (exit status, response, stdout, stderr)."""

    def run(*arguments, weights=model):
        arguments = (str(weights), "--max_new_tokens", "8", *map(str, arguments))
        monkeypatch.setattr(sys, "argv", ["chat.py", *arguments])
        status = cli.run(chat.main)
        said = capsys.readouterr()
        found = re.search(r"^response: (.*)$", said.out, re.MULTILINE)
        return status, found and found.group(1), said.out, said.err

    return run


def test_what_it_prints(call):
    status, response, out, err = call()
    assert status == 0 and f"about {chat.EXAMPLE}" in err
    lines = out.split("\n")
    assert lines[0] == "prompt: 请描述图片内容"
    assert lines[1] == f"response: {response}" and response
    assert lines[2] == "------------------"
    assert re.fullmatch(r"It took \d+\.\d\d seconds!", lines[3])
    assert lines[4:] == [""]


def test_path_and_base64_and_data_uri_are_one_image(call, tmp_path):
    path = tmp_path / "a picture.jpg"
    path.write_bytes(image_bytes(3))
    answer = call(path)[1]
    assert answer != call()[1]
    assert call(image_base64(3))[1] == answer
    assert call("data:image/jpeg;base64," + image_base64(3))[1] == answer
    assert call(chat.EXAMPLE)[1] == call()[1]


def test_image_and_prompt_exchanged(call):
    status, _, _, err = call("What is it?", chat.EXAMPLE)
    assert status == 2 and err.splitlines()[-1].endswith("; the order is MODEL IMAGE PROMPT")
    said = call("请描述图片内容")[3]
    assert "请描述图片内容 is not a file" in said and said.endswith("; the order is MODEL IMAGE PROMPT\n")
    assert "MODEL IMAGE PROMPT" not in call("no/such/file.jpg", "What is it?")[3]
    assert "example.jpg is a file, not a model folder" in call("a.jpg", weights=chat.EXAMPLE)[3]


def test_the_prompt_and_the_folder_that_holds_the_model(call, model, tmp_path):
    status, response, out, _ = call(chat.EXAMPLE, "What is it?")
    assert status == 0 and out.startswith("prompt: What is it?\n")
    assert response != call()[1]
    inside = call(chat.EXAMPLE, "What is it?", weights=model.rsplit("/", 1)[0])
    assert inside[1] == response


def test_chat_and_predict_agree(call, model, tmp_path):
    from paddlemix.inference.prediction import predict_file

    (tmp_path / "in.tsv").write_text("a\t" + image_base64(3) + "\n")
    predict_file(str(tmp_path / "in.tsv"), str(tmp_path / "out.tsv"), model, max_new_tokens=8)
    assert (tmp_path / "out.tsv").read_text() == "a\t" + call(image_base64(3))[1] + "\n"


@pytest.mark.parametrize(
    "image, says",
    [
        ("no/such/file.jpg", "no/such/file.jpg is not a file"),
        (__file__, "test_chat.py: not a JPEG"),
        ("http://127.0.0.1:9/x.jpg", "cannot fetch http://127.0.0.1:9/x.jpg"),
        ("ftp://example.org/x.jpg", "only http and https"),
    ],
)
def test_images_that_cannot_be_had(call, image, says):
    status, response, _, err = call(image)
    assert (status, response) == (2, None)
    last = err.strip().split("\n")[-1]
    assert last.startswith("error: ") and says in last


def test_bad_options(call, tmp_path):
    status, _, _, err = call(weights=tmp_path)
    assert status == 2 and "no config.json" in err
    for bad in (["--max_new_tokens=0"], ["--dtype=int8"], ["a", "b", "c"], ["--tokens=1"]):
        status, _, _, err = call(*bad)
        assert status == 2
        assert err.startswith("error: ") and err.count("\n") == 1 and "chat.py --help" in err


def test_streamed_is_what_is_said(call):
    _, response, plain, _ = call()
    status, streamed, out, _ = call("--stream")
    assert status == 0 and streamed == response
    assert out.split("\n")[:3] == plain.split("\n")[:3]


def test_several_images(call, tmp_path):
    for seed in (1, 2):
        (tmp_path / f"{seed}.jpg").write_bytes(image_bytes(seed))
    first, second = tmp_path / "1.jpg", tmp_path / "2.jpg"
    both = call(first, "what?", "--image", second)[1]
    assert both not in (call(first, "what?")[1], call(second, "what?")[1])
    # The first of --image needs no IMAGE in front, and then no red cup is shown.
    assert call("--image", first)[1] == call(first)[1]


def test_sampling_is_seeded(call):
    hot = ["--temperature", "1.5", "--top_p", "0.95", "--top_k", "50"]
    once = call(*hot, "--seed", "3")[1]
    assert call(*hot, "--seed", "3")[1] == once
    assert {call(*hot, "--seed", str(seed))[1] for seed in range(4, 8)} != {once}
    greedy = call()[1]
    assert call("--top_k", "1")[1] == call("--num_beams", "1")[1] == greedy
    assert call("--num_beams", "3")[0] == 0
    flags = ("--seed", "3", "--samples", "4", "--choose")
    several = {call(*hot, *flags, how)[1] for how in ("first", "logprob", "consensus")}
    assert None not in several and len(several) > 1
    assert call("--no_repeat_ngram_size", "1", "--min_new_tokens", "5")[1] != greedy
    assert call("--repetition_penalty", "5")[1] != greedy


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--num_beams=2", "--top_p=0.5", "--seed=1"], "--num_beams searches, --top_p, --seed samples"),
        (["--samples=2", "--stream"], "--stream does not go with --samples"),
        (["--num_beams=2", "--stream"], "--stream does not go with --num_beams"),
        (["--seed=1"], "--seed without sampling changes nothing"),
        (["--seed=-1", "--top_k=3"], "--seed: must be an integer"),
        (["--temperature=0"], "--temperature: must be a number of at least 1e-06"),
        (["--temperature=nan"], "a number of at least 1e-06"),
        (["--top_p=1.5"], "--top_p: must be a number above 0 and at most 1"),
        (["--top_k=0"], "--top_k"),
        (["--boxes=boxes.txt"], "ending in .png"),
    ],
)
def test_what_cannot_go_together_is_refused_before_the_model_is_loaded(call, flags, says, monkeypatch):
    monkeypatch.setattr("paddlemix.inference.loading.load_model", None)
    status, _, _, err = call(*flags)
    assert status == 2 and says in err and err.startswith("error: ") and err.count("\n") == 1


def test_boxes_are_not_drawn_over_an_image(call, tmp_path, monkeypatch):
    monkeypatch.setattr("paddlemix.inference.loading.load_model", None)
    (tmp_path / "a.jpg").write_bytes(image_bytes(1))
    status, _, _, err = call(tmp_path / "a.jpg", "--boxes", tmp_path / "a.jpg")
    assert status == 2 and "a.jpg would be overwritten" in err


def test_boxes_of_an_answer_are_drawn(call, tmp_path, monkeypatch):
    from PIL import Image

    from paddlemix.models.mgen_vl import generation

    says = "<ref>杯子</ref><box>(100,100),(900,900)</box>"
    monkeypatch.setattr(generation, "decode_response", lambda *args: says)
    status, response, out, err = call("--boxes", tmp_path / "cup.png")
    assert status == 0 and response == says and f"boxes drawn in {tmp_path / 'cup.png'}: 1" in err
    assert len(out.split("\n")) == 5
    with Image.open(tmp_path / "cup.png") as drawn, Image.open(chat.EXAMPLE) as original:
        assert drawn.size == original.size
        assert drawn.getpixel((45, 200)) != original.convert("RGB").getpixel((45, 200))


@pytest.mark.parametrize("flags", [[], ["--stream"], ["--interactive"], ["--interactive", "--stream"]])
def test_an_answer_does_not_steer_the_terminal(call, flags, monkeypatch):
    from paddlemix.models.mgen_vl import generation

    monkeypatch.setattr(generation, "decode_response", lambda *args: "\x1b]0;title\x07杯\u3000子\x9b2J")
    lines = iter(["what?", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    status, _, out, _ = call(*flags)
    assert status == 0 and not set("\x1b\x07\x9b") & set(out)
    # The blank between Chinese characters is none of these; a single answer's blanks become plain ones.
    blank = "\u3000" if flags else " "
    assert f"\\x1b]0;title\\x07杯{blank}子\\x9b2J\n" in out


@pytest.fixture(scope="module")
def server():
    """http://127.0.0.1:…/ gives an image; /hop redirects to it; there is nothing else."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response({"/": 200, "/hop": 302}.get(self.path, 404))
            if self.path == "/hop":
                self.send_header("Location", "/")
            self.end_headers()
            self.wfile.write(b"" if self.path == "/hop" else image_bytes(3))

        def log_message(self, *args):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}/"
    httpd.shutdown()


def test_images_by_url(call, server, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    status, _, _, err = call(server + "none")
    assert status == 2 and "answered 404" in err
    wanted = call(image_base64(3))[1]
    assert call(server)[1] == call(server + "hop")[1] == wanted


# ---- --interactive


@pytest.fixture
def talk(call, monkeypatch):
    """talk(lines, *flags) → (exit status, stdout, stderr). A line may be an exception, raised at the prompt."""

    def run(lines, *flags):
        lines = iter(lines)

        def read(prompt):
            line = next(lines, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read)
        status, _, out, err = call("--interactive", *flags)
        return status, out, err

    return run


def test_several_turns(talk, call, tmp_path, server, monkeypatch):
    path = tmp_path / "a b.jpg"
    path.write_bytes(image_bytes(3))
    alone = call(path, "what?")[1]
    lines = [f"/image {path}", "what?", "", "and now?", "/reset", f"/image '{path}'", "what?", "/quit", "x"]
    status, out, err = talk(lines)
    assert status == 0 and "no image yet: /image PATH" in err, err
    taken, first, second, forgotten, again, anew = out.rstrip("\n").split("\n")
    assert (taken, forgotten, again) == ("image added; ask about it", "conversation reset", taken)
    assert first == anew == alone
    # History counts: the second turn is not what the question alone gets.
    assert talk(["and now?"])[1].rstrip("\n") != second
    # The same turns with the answers streamed, the image given in front, and a first question.
    status, out, err = talk(["and now?"], "--stream", path, "what?")
    assert "no image yet" not in err and out == f"> what?\n{first}\n{second}\n\n"
    monkeypatch.setenv("no_proxy", "*")
    _, out, err = talk([f"/image {server}none", f"/image {server}", "what?"])
    assert "answered 404" in err and out == f"image added; ask about it\n{alone}\n\n"


@pytest.mark.parametrize("flags", [[], ["--stream"]])
def test_an_empty_answer_is_said(talk, monkeypatch, flags):
    monkeypatch.setattr("paddlemix.inference.conversation.Conversation.ask", lambda *_: " ")
    # The last is what a notebook raises that takes no input.
    status, out, _ = talk(["what?", NotImplementedError()], *flags)
    assert (status, out) == (0, "(an empty answer)\n\n")


def test_a_mistake_costs_its_own_turn(talk, call):
    files = [chat.EXAMPLE, f"'{chat.EXAMPLE}'"]
    lines = ["/image no/such.jpg", "/image", "/what", *files, KeyboardInterrupt(), "/help", "what?"]
    status, out, err = talk(lines, "--image", image_base64(3))
    assert status == 0
    errors = [line for line in err.split("\n") if line.startswith("error: ")]
    assert len(errors) == 5 and "/help lists them" in errors[2]
    assert errors[3:] == [f"error: that is an image file: /image {path} adds it" for path in files]
    assert "type /quit to leave" in out and "/image PATH" in out
    assert out.split("\n")[-3] == call(image_base64(3), "what?")[1]


def test_ctrl_c_stops_the_answer_and_not_the_program(talk, call, monkeypatch, request):
    """A real SIGINT in the middle of a streamed answer."""
    from paddlemix.inference import conversation

    # Tests that were started in the background, without a terminal, ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    pieces, write = [], conversation.write_piece

    def stop_at_3(piece):
        write(piece)
        pieces.append(piece)
        if len(pieces) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(conversation, "write_piece", stop_at_3)
    status, out, _ = talk(["what?", "what?"], "--stream", "--image", image_base64(3))
    assert status == 0
    stopped, told = "".join(pieces[:3]), "".join(pieces[3:])
    assert out == f"{stopped}\nstopped; the prompt is discarded\n{told}\n\n"
    # Nothing of the stopped turn is left, and the image is still shown.
    assert told.startswith(stopped) and told == call(image_base64(3), "what?")[1]


def test_an_image_is_seen_once_and_out_of_memory_is_a_line(model, monkeypatch):
    from paddlemix.inference.conversation import Conversation
    from paddlemix.inference.loading import load_model
    from paddlemix.utils.errors import JobFailed

    loaded = load_model(model)
    conversation = Conversation(loaded, max_new_tokens=4)
    seen, visual = [], type(loaded.model.visual).forward
    monkeypatch.setattr(
        type(loaded.model.visual), "forward", lambda self, images: seen.append(images.shape[0]) or visual(self, images)
    )
    conversation.add_image(image_bytes(1))
    conversation.ask("what?")
    conversation.add_image(image_bytes(2))
    conversation.add_image(image_bytes(3))
    conversation.ask("and these?")
    conversation.ask("well?")
    assert seen == [1, 2]
    assert [query for query, _ in conversation.history] == [
        "Picture 1: <img></img>\nwhat?",
        "Picture 2: <img></img>\nPicture 3: <img></img>\nand these?",
        "well?",
    ]
    before = list(conversation.history)

    def full(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(type(loaded.model), "generate", full)
    with pytest.raises(JobFailed, match="out of memory"):
        conversation.ask("more?")
    assert conversation.history == before


def test_drawings_of_a_conversation_have_numbers(talk, tmp_path, monkeypatch):
    from paddlemix.models.mgen_vl import generation

    monkeypatch.setattr(generation, "decode_response", lambda *args: "<box>(1,1),(9,9)</box><img>")
    # A tag that the model made up is no image of the next turn.
    status, _, err = talk(["a", "b"], "--image", image_base64(1), "--boxes", tmp_path / "x.png")
    assert status == 0 and "error" not in err
    assert sorted(path.name for path in tmp_path.glob("x*")) == ["x-2.png", "x.png"]


def test_as_a_user_runs_it(model, root, tmp_path):
    command = [sys.executable, str(root / "chat.py"), model, "--max_new_tokens", "4"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("prompt: 请描述图片内容\nresponse: ")


def test_the_example_is_small_and_an_image(root):
    from PIL import Image

    path = root / "assets" / "example.jpg"
    assert path.stat().st_size < 30_000
    with Image.open(path) as image:
        assert image.size == (448, 336)
