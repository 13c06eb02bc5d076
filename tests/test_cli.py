"""The programs as a user meets them: options, output, errors of one line, exit status."""

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import tiny_model
from tmac_py import _core
from tmac_py.cli import main as cli
from tmac_py.cli.main import COMMANDS
from tmac_py.default_model import cached_path
from tmac_py.errors import TmacError
from tmac_py.model import Model

STATISTICS = re.compile(r"prefill \d+ tokens, [\d.]+ tok/s · decode \d+ tokens?(, [\d.]+ tok/s)?")


@pytest.fixture(scope="module")
def lut(tmp_path_factory):
    return str(tiny_model.write_tiny_model(tmp_path_factory.mktemp("cli") / "tiny.lut"))


@pytest.fixture
def stdin(monkeypatch):
    def give(data, *, terminal=False):
        stream = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8")
        stream.isatty = lambda: terminal
        monkeypatch.setattr(sys, "stdin", stream)

    give(b"", terminal=True)
    return give


@pytest.fixture
def run(capsys, stdin):  # noqa: ARG001 - a terminal, unless a test says otherwise
    """Call a program; gives back (exit status, stdout, stderr)."""

    def call(*argv, program=cli.run):
        try:
            status = program([str(arg) for arg in argv])
        except SystemExit as end:
            status = end.code
        out, err = capsys.readouterr()
        return status, out, err

    return call


def answer_of(run, *argv):
    status, out, err = run(*argv, "--json")
    assert status == 0, err
    return json.loads(out)


def test_text_goes_to_stdout_and_statistics_to_stderr(run, lut):
    status, out, err = run(lut, "-p", "the cat", "-n", 8, "--seed", 1)
    assert status == 0
    assert out.endswith("\n")
    assert len(err.splitlines()) == 1
    assert STATISTICS.fullmatch(err.strip())
    quiet = run(lut, "-p", "the cat", "-n", 8, "--seed", 1, "-q")
    assert quiet == (0, out, "")


def test_json_is_one_object(run, lut):
    status, out, err = run(lut, "--prompt", "the cat", "-n", 6, "--temp", 0, "--json", "-s", 3)
    assert status == 0
    assert STATISTICS.fullmatch(err.strip())
    answer = json.loads(out)
    assert out.count("\n") == 1
    assert set(answer) == {
        "text",
        "ids",
        "prompt_ids",
        "finish_reason",
        "timings",
        "model",
        "seed",
    }
    assert (answer["model"], answer["seed"]) == (lut, 3)
    assert answer["timings"]["n_gen"] == len(answer["ids"])
    assert answer["timings"]["n_prompt"] == len(answer["prompt_ids"])
    with Model.load(lut) as model:
        prompt = model.chat_prompt([{"role": "user", "content": "the cat"}])
        wanted = model.generate(prompt, max_tokens=6, temperature=0)
    assert answer["prompt_ids"] == prompt
    assert answer["ids"] == list(wanted.ids)
    assert answer["text"] == wanted
    assert answer["finish_reason"] == wanted.finish_reason


def test_streamed_text_is_that_of_json(run, lut):
    options = (lut, "-p", "the cat", "-n", 12, "--seed", 4)
    text = answer_of(run, *options)["text"]
    assert run(*options)[1] == (text if text.endswith("\n") else f"{text}\n")


def test_raw_continues_the_prompt_as_it_is(run, lut):
    raw = answer_of(run, lut, "-p", "the cat", "-n", 1, "--raw")
    assert raw == answer_of(run, lut, "-p", "the cat", "-n", 1, "-no-cnv", "-s", raw["seed"]) | {
        "timings": raw["timings"]
    }
    with Model.load(lut) as model:
        assert raw["prompt_ids"] == model.tokenizer.encode("the cat")


def test_system_prompt(run, lut):
    with Model.load(lut) as model:
        wanted = model.chat_prompt(
            [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
        )
    for option in ("--system", "-sys", "--system-prompt"):
        answer = answer_of(run, lut, "-p", "hi", option, "be brief", "-n", 1)
        assert answer["prompt_ids"] == wanted


def test_where_the_prompt_comes_from(run, lut, stdin, tmp_path):
    def ids(*options):
        return answer_of(run, lut, "--raw", "-n", 1, *options)["prompt_ids"]

    wanted = ids("-p", "the café")
    file = tmp_path / "prompt.txt"
    for data in ("the café", "the café\n", "the café\r\n", "\ufeffthe café\n"):
        file.write_bytes(data.encode())
        assert ids("-f", file) == wanted
    data = "the café\n".encode()
    for options in ((), ("-p", "-"), ("-f", "-")):
        stdin(data)
        assert ids(*options) == wanted
    stdin(b"not this")
    assert ids("-p", "the café") == wanted


def test_options_have_the_names_people_type(run, lut):
    wanted = answer_of(run, lut, "-p", "x", "-n", 3, "--temp", 0)["ids"]
    for options in (
        ["--max-tokens", 3, "--temperature", 0],
        ["--n-predict", 3, "--temp", 0, "-t", 1],
        ["--predict", 3, "--top-k", 1, "--threads", 2],
        ["-n", 3, "--temp", 0, "-c", 64],
        ["-n", 3, "--temp", 0, "--ctx-size", 0, "--no-check"],
    ):
        assert answer_of(run, "-m", lut, "-p", "x", *options)["ids"] == wanted
    assert len(answer_of(run, lut, "-p", "x", "-n", 3, "--tables", "exact")["ids"]) <= 3


def test_seed_repeats_an_answer(run, lut):
    first = answer_of(run, lut, "-p", "x", "-n", 20)
    again = answer_of(run, lut, "-p", "x", "-n", 20, "--seed", first["seed"])
    assert again["ids"] == first["ids"]
    assert answer_of(run, lut, "-p", "x", "-n", 2, "-s", -1)["seed"] >= 0


def test_logit_bias(run, lut):
    options = ("-p", "x", "-n", 3, "--seed", 1, "--raw", "--temp", 0)
    plain = answer_of(run, lut, *options)["ids"]
    assert answer_of(run, lut, *options, "--logit-bias", "77+1000.5")["ids"] == [77] * 3
    bias = ("-l", f"{plain[0]}-inf", "--logit-bias", "77-.5")
    assert plain[0] not in answer_of(run, lut, *options, *bias)["ids"]


def test_without_a_limit_the_context_ends_the_answer(run, lut):
    answer = answer_of(run, lut, "-p", "x", "--raw", "-c", 9, "--temp", 0)
    assert len(answer["prompt_ids"]) + len(answer["ids"]) <= 9
    if answer["finish_reason"] == "length":
        assert len(answer["prompt_ids"]) + len(answer["ids"]) == 9


@pytest.mark.parametrize("option", ["--stop", "-r", "--reverse-prompt"])
def test_stop_strings(run, lut, option):
    text = answer_of(run, lut, "-p", "x", "-n", 20, "--seed", 1)["text"]
    stop = text[3:6]
    answer = answer_of(run, lut, "-p", "x", "-n", 20, "--seed", 1, "--stop", "never", option, stop)
    assert answer["text"] == text[: text.index(stop)]
    assert answer["finish_reason"] == "stop"


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_stops_and_still_reports(run, lut, monkeypatch, as_json):
    forward, calls = Model.forward, [0]

    def interrupted(self, *args):
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt
        return forward(self, *args)

    monkeypatch.setattr(Model, "forward", interrupted)
    options = ["--json"] if as_json else []
    status, out, err = run(lut, "-p", "the cat", "--temp", 0, *options)
    assert status == 130
    found = re.search(r"decode (\d+) tokens, .* · interrupted$", err.strip())
    assert found is not None
    assert int(found[1]) >= 3  # more where a call verified guesses
    if as_json:
        assert json.loads(out)["finish_reason"] == "interrupted"
        assert len(json.loads(out)["ids"]) == int(found[1])


def test_ctrl_c_in_the_prompt_says_how_far_it_came(run, tmp_path, monkeypatch):
    lut = tiny_model.write_tiny_model(tmp_path / "long.lut", max_position_embeddings=1600)
    forward, calls = Model.forward, [0]

    def interrupted(self, *args):
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return forward(self, *args)

    monkeypatch.setattr(Model, "forward", interrupted)
    status, out, err = run(lut, "-p", "x " * 400, "--raw")
    assert (status, out.strip()) == (130, "")
    assert re.match(r"prefill 512 of \d+ tokens, .* · decode 0 tokens · interrupted$", err.strip())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["-n", "0"], "-n/--n-predict/--max-tokens/--predict: '0' is not allowed"),
        (["-n", "x"], "'x' is not allowed; give a whole number from 1 up, or -1"),
        (["-t", "0"], "-t/--threads: '0' is not allowed; give a whole number from 1 to 1024"),
        (["-t", "1025"], "from 1 to 1024"),
        (["-t", "1.5"], "'1.5' is not allowed"),
        (["-c", "-1"], "-c/--ctx-size: '-1' is not allowed"),
        (["-c", "97"], "n_ctx is 97; allowed: 0 to 96"),
        (["-c", "3"], "the context holds 3"),
        (["--temp", "-1"], "temperature is -1.0; allowed"),
        (["--temp", "warm"], "--temp/--temperature: invalid float value: 'warm'"),
        (["--top-k", "-1"], "top_k is -1"),
        (["--top-p", "0"], "top_p is 0.0"),
        (["--min-p", "2"], "min_p is 2.0"),
        (["--repeat-penalty", "0"], "repeat_penalty is 0.0"),
        (["--repeat-last-n", "-2"], "repeat_last_n is -2"),
        (["--presence-penalty", "inf"], "presence_penalty is inf"),
        (["--frequency-penalty", "nan"], "frequency_penalty is nan"),
        (["--logit-bias", "5*2"], "'5*2' is not allowed; give a token id and what to add"),
        (["--logit-bias", "5+inf"], "'5+inf' is not allowed"),
        (["--logit-bias", "5+1e99"], "'5+1e99' is not allowed"),
        (["--logit-bias", "99999+1"], "a token id of logit_bias is 99999; allowed: 0 to"),
        (["--seed", "-2"], "'-2' is not allowed"),
        (["--stop", ""], "stop is ''"),
        (["--tables", "int4"], "invalid choice: 'int4'"),
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["--max-tok", "3"], "unrecognized arguments"),
        (["-f", "file"], "not allowed with argument"),
        (["--raw", "--system", "s"], "--system needs the chat template"),
        (["-m", "other.lut"], "two models are given"),
    ],
)
def test_an_option_that_is_wrong_is_one_line(run, lut, options, text):
    status, out, err = run(lut, "-p", "x", *options)
    assert (status, out) == (2, "")
    assert err.startswith("tmac-run: error: ")
    assert len(err.splitlines()) == 1
    assert text in err


@pytest.mark.parametrize(
    ("data", "terminal", "text"),
    [
        (b"", True, "no prompt: give one with -p/--prompt, -f/--file or on standard input"),
        (b"", False, "the prompt is empty"),
        (b" \n", False, "the prompt is empty"),
        (b"ab\xff", False, "standard input: not UTF-8 text (byte 0xff at offset 2)"),
    ],
)
def test_no_prompt_worth_the_name(run, lut, stdin, data, terminal, text):
    stdin(data, terminal=terminal)
    status, out, err = run(lut)
    assert (status, out) == (2, "")
    assert text in err


def test_prompts_that_cannot_be_read(run, lut, tmp_path):
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"caf\xe9")
    assert f"{bad}: not UTF-8 text" in run(lut, "-f", bad)[2]
    assert "No such file" in run(lut, "-f", tmp_path / "missing")[2]
    assert "the prompt is empty" in run(lut, "-p", "")[2]
    assert "not valid Unicode" in run(lut, "-p", "caf\udce9")[2]
    long = run(lut, "-p", "x " * 200, "--raw")
    assert long[0] == 2
    assert re.search(r"the prompt has \d+ tokens, the context holds 96", long[2])


def test_models_that_are_none(run, tmp_path, monkeypatch):
    monkeypatch.setenv("TMAC_CACHE", str(tmp_path / "cache"))
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF" + bytes(60))
    safetensors = tmp_path / "model.safetensors"
    safetensors.write_bytes((2).to_bytes(8, "little") + b"{}")
    text = tmp_path / "text.lut"
    text.write_text("hello")
    for path, wanted in (
        (gguf, f"{gguf}: broken GGUF file"),
        (safetensors, "a safetensors file, but not a .lut; convert a checkpoint with tmac-convert"),
        (tmp_path, "a folder without config.json"),
        (tmp_path / "none.lut", "no such file; models with a name: smollm2-135m"),
        (tmp_path / "none.gguf", "no such file"),
        (text, "not a .lut file"),
    ):
        status, out, err = run(path, "-p", "x")
        assert (status, out) == (2, "")
        assert len(err.splitlines()) == 1
        assert wanted in err


def test_system_prompt_without_a_template(run, tmp_path):
    base = tiny_model.write_tiny_model(tmp_path / "base.lut", chat=False)
    status, _, err = run(base, "-p", "x", "--system", "y")
    assert status == 2
    assert "this model has none" in err
    assert run(base, "-p", "x", "-n", 1)[0] == 0


def test_the_default_model_is_fetched_by_name(run, lut, monkeypatch):
    calls = []

    def ensure_model(name, **options):
        calls.append((name, options.get("cache_dir"), options["offline"]))
        return lut

    monkeypatch.setattr("tmac_py.default_model.ensure_model", ensure_model)
    assert run("-p", "x", "-n", 1)[0] == 0
    assert run("smollm2-135m", "-p", "x", "-n", 1, "--cache-dir", "d", "--offline", "-q")[0] == 0
    assert run("-p", "x", "-n", 0)[0] == 2
    assert calls == [("smollm2-135m", None, False), ("smollm2-135m", "d", True)]


def test_inspect_knows_the_models_by_name_and_never_fetches(run, lut, monkeypatch, tmp_path):
    monkeypatch.setattr("tmac_py.default_model.ensure_model", None)
    monkeypatch.setenv("TMAC_CACHE", str(tmp_path / "cache"))
    status, out, err = run("smollm2-135m", program=cli.inspect)
    assert (status, out) == (2, "")
    fetch = "fetch it with: tmac-run smollm2-135m -p Hello"
    assert err == f"tmac-inspect: error: smollm2-135m is not in {tmp_path / 'cache'}; {fetch}\n"
    path = cached_path("smollm2-135m", tmp_path)
    path.write_bytes(Path(lut).read_bytes())
    for options in (["--cache-dir", tmp_path], ["--cache-dir", tmp_path, "--no-check"]):
        status, out, err = run("smollm2-135m", *options, program=cli.inspect)
        assert (status, err) == (0, "")
        assert str(path) in out
    missing = run("smollm3", program=cli.inspect)[2]
    assert "smollm3: no such file; models with a name: smollm2-135m" in missing


@pytest.mark.usefixtures("stdin")
def test_debug_shows_the_traceback(lut):
    with pytest.raises(TmacError, match="top_p"):
        cli.run([lut, "-p", "x", "--top-p", "0", "--debug"])


@pytest.mark.parametrize(
    "program", [cli.main, cli.run, cli.convert, cli.inspect, cli.info], ids=lambda p: p.__name__
)
def test_version_and_help(run, program):
    for option in ("-v", "--version"):
        status, out, _ = run(option, program=program)
        assert status == 0
        assert out.split()[1:] == [_core.__version__, f"({_core.active_isa()})"]
    status, out, _ = run("--help", program=program)
    assert status == 0
    if program is not cli.main:
        assert f"examples:\n  tmac-{program.__name__}" in out.replace("git diff | ", "")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_examples_in_the_help_are_arguments_that_exist(command):
    assert len(command.examples) > 1
    for example in command.examples:
        (call,) = re.findall(r"tmac (\w.*)", example)
        call = re.split(r" [|>#] | *\)\"", call)[0]
        args = cli.main_parser().parse_args(shlex.split(call))
        assert args.prog == f"tmac {command.name}"


def test_tmac_has_every_command(run, lut):
    status, out, _ = run("--help", program=cli.main)
    assert status == 0
    for command in COMMANDS:
        assert command.name in out
        assert run(command.name, "--help", program=cli.main)[1].startswith(
            f"usage: tmac {command.name}"
        )
    assert run("run", lut, "-p", "x", "-n", 1, program=cli.main)[0] == 0
    for argv in ([], ["bogus"]):
        status, _, err = run(*argv, program=cli.main)
        assert status == 2
        assert err.startswith("tmac: error: ")
        assert len(err.splitlines()) == 1
    assert run("run", lut, "-p", "", program=cli.main)[2].startswith("tmac run: error: ")


def start(*argv, **options):
    environment = {**os.environ, **options.pop("env", {})}
    command = [sys.executable, "-m", "tmac_py", *argv]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, **options
    )


def test_an_unknown_isa_is_one_line(lut):
    process = start("run", lut, "-p", "x", env={"TMAC_ISA": "mmx"})
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, b"")
    assert b"'mmx'" in err
    assert b"scalar" in err
    assert len(err.splitlines()) == 1


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    lut = tiny_model.write_tiny_model(
        tmp_path / "endless.lut", max_position_embeddings=8192, eos_token_ids=()
    )
    process = start("run", str(lut), "-p", "x")
    assert process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=60) == 141


def test_ctrl_c_for_real(tmp_path):
    lut = tiny_model.write_tiny_model(
        tmp_path / "endless.lut", max_position_embeddings=65536, eos_token_ids=()
    )
    process = start("run", str(lut), "-p", "x", "-t", "1")
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.decode().strip().endswith("· interrupted")
    assert len(err.splitlines()) == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")  # noqa: PTH110
def test_no_room_for_the_answer(lut):
    with open("/dev/full", "wb") as full:  # noqa: PTH123
        command = [sys.executable, "-m", "tmac_py", "run", lut, "-p", "x", "-n", "1"]
        process = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=60)
    assert process.returncode == 2
    assert process.stderr.splitlines() == [b"tmac run: error: No space left on device"]


def test_import_is_light():
    code = "import sys, tmac_py; print([m for m in ('numpy', 'jinja2') if m in sys.modules])"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.stdout.strip() == "[]"
