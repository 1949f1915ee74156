"""PKG6: every packaged runtime reads a conversation as the tokenizer does, and stops where the turn ends."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from package_inputs import digits_apart, to_gguf, to_onnx, trained

from tasks.errors import ArtifactError, StageError
from tasks.models import chat, loading
from tasks.package import parity, target_ollama
from tasks.package.prompt_format import PromptFormat, probe, render
from tasks.package.release import Release
from tasks.runtimes import llama, onnx_genai
from tasks.runtimes.protocol import PromptReader

ROLES = "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
BOS = "{{ bos_token }}" + ROLES
CLOSES = ROLES.replace(
    "{% endfor %}{% if", "{% endfor %}{% if not add_generation_prompt %}{{ eos_token }}{% endif %}{% if"
)
BRACES = ROLES.replace("m.content", "'{' + m.content + '}'")
DATED = "{{ '<|system|>\nToday: ' + strftime_now('%d %b %Y') + '\n' }}" + ROLES
TRIMS = ROLES.replace("m.content", "m.content | trim")
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + ROLES
QUOTES = ROLES.replace("'<|' + m.role + '|>\n'", "'{{ \"' + m.role + '\" }}'")
FORGETS = "{% for m in messages %}{% if loop.last or m.role != 'assistant' %}[{{ m.role }}]{{ m.content }}{% endif %}{% endfor %}"
CHATML = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


CONVERSATION = parity.CONVERSATIONS["one question"]


@pytest.fixture(scope="session")
def model(tiny_model_folder: Path) -> Path:
    return trained(tiny_model_folder)


@pytest.fixture
def tokenizer(model: Path):
    return loading.load_tokenizer(model)


@pytest.fixture(scope="session")
def gguf(model: Path) -> PromptReader:
    return llama.prompt_reader(to_gguf(model))


@pytest.fixture(scope="session")
def onnx(model: Path) -> PromptReader:
    return onnx_genai.prompt_reader(to_onnx(model))


@pytest.mark.parametrize("kind", ["gguf", "onnx"])
def test_the_runtime_reads_every_conversation_as_the_tokenizer_does(model: Path, tokenizer, request, kind: str):
    runtime = request.getfixturevalue(kind)
    assert parity.difference(tokenizer, runtime) is None
    assert parity.check(model, tokenizer, runtime, model) == len(parity.CONVERSATIONS)


def test_joined_letters_are_asked_for_where_only_the_tokenizer_joins_them(
    model: Path, tokenizer, gguf: PromptReader, onnx: PromptReader
):
    """Qwen's tokenizer does (Unicode's NFC); neither runtime knows."""
    from tokenizers.normalizers import NFC

    assert not parity.needs_composed(tokenizer, gguf)
    tokenizer.backend_tokenizer.normalizer = NFC()
    for runtime in (gguf, onnx):
        assert parity.needs_composed(tokenizer, runtime)
        assert "'unicode'" in (parity.difference(tokenizer, runtime) or "")
        assert parity.check(model, tokenizer, runtime, model) == len(parity.CONVERSATIONS)


def test_a_template_that_the_runtime_has_otherwise_is_refused(model: Path, tokenizer, gguf: PromptReader):
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n", "assistant:\n")
    with pytest.raises(
        StageError,
        match=r"'one question' .* 37 \(of 39 and 38\): .* ':\\n', .* '\\n'",
    ):
        parity.check(model, tokenizer, gguf, Path("x.gguf"))


def test_a_lost_default_system_prompt_is_seen(tokenizer, gguf: PromptReader):
    tokenizer.chat_template = CHATML
    assert re.search(r"'user\\nTurn on.*'system\\nYou are a", parity.difference(tokenizer, gguf) or "")


def test_a_tokenizer_that_splits_otherwise_is_seen(tokenizer, gguf: PromptReader):
    """What transformers makes of SmolLM2's tokenizer when it reads it from a GGUF: digits no longer stand alone."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokenizer.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    assert "'digits after white space'" in (parity.difference(tokenizer, gguf) or "")


def test_a_pre_tokenizer_that_the_runtime_passes_over_is_seen(model: Path, tokenizer, tmp_path: Path):
    """The same splits by the name of `Digits`: equal for the tokenizer, unknown to ONNX Runtime GenAI."""
    folder = tmp_path / "onnx"
    shutil.copytree(to_onnx(model), folder)
    before = chat.prompt_ids(tokenizer, parity.CONVERSATIONS["digits after white space"])
    tokenizer.backend_tokenizer.pre_tokenizer = digits_apart(spelled_out=False)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    assert chat.prompt_ids(tokenizer, parity.CONVERSATIONS["digits after white space"]) == before
    assert "'digits after white space'" in (parity.difference(tokenizer, onnx_genai.prompt_reader(folder)) or "")


@pytest.mark.parametrize("kind", ["gguf", "onnx"])
def test_an_end_of_turn_token_that_the_runtime_ignores_is_refused(
    model: Path, tokenizer, tmp_path: Path, request, kind: str
):
    told = tmp_path / "model"
    told.mkdir()
    (told / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 16]}))
    with pytest.raises(StageError, match=r"\['<empty_output>'\]"):
        parity.check(told, tokenizer, request.getfixturevalue(kind), model)


@pytest.mark.parametrize("kind", ["gguf", "onnx"])
def test_a_damaged_file_is_an_artifact_error(tmp_path: Path, kind: str):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(40))
    (tmp_path / "genai_config.json").write_text("{}")
    with pytest.raises(ArtifactError, match="`quantize`"):
        {"gguf": llama, "onnx": onnx_genai}[kind].prompt_reader(tmp_path / "model.gguf" if kind == "gguf" else tmp_path)


def test_the_servers_setting_keeps_it_from_replacing_a_known_template(model: Path, tokenizer, tmp_path: Path):
    """llama-cpp-python knows this template's text and would render it by a formatter of its own."""
    import llama_cpp

    shutil.copytree(model, tmp_path / "chatml")
    (tmp_path / "chatml" / "chat_template.jinja").write_text(CHATML)
    path = to_gguf(tmp_path / "chatml")
    tokenizer.chat_template = CHATML
    messages = parity.CONVERSATIONS["one question"]

    def prompt_tokens(**settings: str) -> int:
        llama = llama_cpp.Llama(str(path), n_ctx=256, verbose=False, **settings)
        return llama.create_chat_completion(messages, max_tokens=1, temperature=0)["usage"]["prompt_tokens"]

    want = len(chat.prompt_ids(tokenizer, messages))
    assert prompt_tokens(chat_format="chat_template.default") == want
    assert prompt_tokens() != want
    assert parity.difference(tokenizer, llama.prompt_reader(path)) is None


def test_special_tokens_in_a_text_are_read_as_such_by_all(tokenizer, gguf: PromptReader, onnx: PromptReader):
    """The injection that parity does not prevent, held so that nobody takes it for prevented."""
    messages = parity.CONVERSATIONS["special tokens in the text"]
    ends = chat.prompt_ids(tokenizer, messages).count(tokenizer.eos_token_id)
    assert ends == 1 + 1 + 1  # the default system turn, the user's, and the one in the text
    assert gguf.ids(messages).count(tokenizer.eos_token_id) == ends
    assert onnx.ids(messages).count(tokenizer.eos_token_id) == ends


# --- templates for runtimes without Jinja -------------------------------------------------------------


def run_go(template: str, messages: list[dict[str, str]]) -> str:
    """Evaluate the part of Go's text/template that `PromptFormat.go` writes: range, if, else if, eq, ne, and, strings."""
    # An action is a quoted text, which may hold braces, or words without any.
    tokens = re.split(r'\{\{ ("(?:[^"\\]|\\.)*"|[^{}]*?) \}\}', template)
    at = 0

    def test(words: str, i: int, m: dict[str, str]) -> bool:
        both = re.fullmatch(r"and \((.*?)\) \((.*?)\)", words)
        if both:
            return test(both[1], i, m) and test(both[2], i, m)
        operator, left, right = re.fullmatch(r"(eq|ne) (\S+) (\S+)", words).groups()
        value = {"$i": i, "$m.Role": m["role"]}[left]
        return (value == json.loads(right)) == (operator == "eq")

    def block(i: int, m: dict[str, str], live: bool, top: bool = False) -> str:
        """Text up to this block's end; leaves `at` behind it."""
        nonlocal at
        out = ""
        while at < len(tokens):
            word = tokens[at]
            at += 1
            if at % 2:
                out += word if live else ""
            elif word == "range $i, $m := .Messages":
                start = at
                for n, message in enumerate(messages):
                    at = start
                    out += block(n, message, live)
            elif word.startswith("if "):
                out += choice(word[3:], i, m, live)
            elif word == "end" or word.startswith("else if "):
                return out
            elif live:
                out += m["content"] if word == "$m.Content" else json.loads(word)
        assert top
        return out

    def choice(words: str, i: int, m: dict[str, str], live: bool) -> str:
        done, out = False, ""
        while True:
            holds = live and not done and test(words, i, m)
            out += block(i, m, holds)
            done |= holds
            if tokens[at - 1] == "end":
                return out
            words = tokens[at - 1].removeprefix("else if ")

    return block(0, {}, True, top=True)


@pytest.mark.parametrize(
    "template",
    [None, CHATML, ROLES, BOS, QUOTES, CLOSES, BRACES, DATED],
    ids=["smollm2", "chatml", "roles", "bos", "quotes", "closes", "braces", "dated"],
)
def test_the_go_template_renders_what_jinja_does(tokenizer, template: str | None):
    tokenizer.chat_template = template or tokenizer.chat_template
    turns = probe(tokenizer, parity.CONVERSATIONS.values())
    assert turns is not None
    for messages in parity.CONVERSATIONS.values():
        assert turns.render(messages) == render(tokenizer, messages)
        assert run_go(turns.go(), messages) == render(tokenizer, messages)
    # Go reads the first two of three braces as the beginning of an action.
    assert "{{{" not in turns.go()


def test_a_template_that_writes_the_day_is_trained_with_one_that_never_changes(tokenizer):
    plain = chat.prompt_ids(tokenizer, CONVERSATION)
    assert chat.prompt_ids(tokenizer, CONVERSATION, today=True) == plain
    tokenizer.chat_template = DATED
    fixed, today = (tokenizer.decode(chat.prompt_ids(tokenizer, CONVERSATION, today=now)) for now in (False, True))
    assert "Today: 26 Jul 2024\n" in fixed
    assert "Today: 26 Jul 2024\n" not in today
    tokenizer.chat_template = DATED.replace("strftime_now('%d %b %Y')", "strftime_now('%d' + ' %b %Y')")
    assert tokenizer.decode(chat.prompt_ids(tokenizer, CONVERSATION)) == fixed
    tokenizer.chat_template = DATED
    assert "Today: 26 Jul 2024\n" in probe(tokenizer, parity.CONVERSATIONS.values()).go()


def read_modelfile(text: str) -> list[tuple[str, str]]:
    """Directives and their values, as Ollama's parser reads them: a value goes on until its quotes are closed."""
    found, lines = [], text.split("\n")
    while lines:
        word, _, value = lines.pop(0).partition(" ")
        if word == "PARAMETER":
            name, _, value = value.partition(" ")
            word = f"PARAMETER {name}"
        for quote in ('"""', '"'):
            if value.startswith(quote):
                while len(value) < 2 * len(quote) or not value.endswith(quote):
                    value += "\n" + lines.pop(0)
                value = value[len(quote) : -len(quote)]
                break
        found += [(word, value)] if word else []
    return found


@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    stops=st.lists(st.text('ab"\\{ \n', min_size=1, max_size=9), max_size=3),
    system=st.text('ab"\n ', min_size=1, max_size=9),
)
@example(stops=['x"\nFROM elsewhere\nPARAMETER stop "y'], system='"')
def test_nothing_in_a_token_writes_a_directive(tmp_path: Path, stops: list[str], system: str):
    (tmp_path / "weights").touch()
    out = tmp_path / "out"
    shutil.rmtree(out, ignore_errors=True)
    release = Release(
        name="m", variant="q8_0", weights=tmp_path / "weights", runtime_version="1", conversations_checked=1, adds_bos=False,
        needs_composed=False, prompt_format=None, dated=False, bos="", stops=tuple(stops), system=system, example=CONVERSATION,
        answer="", context_length=64, minimum_ram_bytes=1, licence="MIT",
    )  # fmt: skip
    notes = target_ollama.ollama(release, out)
    told = read_modelfile((out / "Modelfile").read_text())
    assert [word for word, _ in told if not word.startswith("PARAMETER")] in (
        ["FROM", "SYSTEM", "LICENSE"],
        ["FROM", "LICENSE"],
    )
    carried = [value for word, value in told if word == "PARAMETER stop"]
    assert carried == [stop for stop in stops if target_ollama.NO_STOP.format(stop=stop) not in notes]
    assert [value for word, value in told if word == "SYSTEM"] == ([] if target_ollama.NO_SYSTEM in notes else [system])


@pytest.mark.parametrize("template", [TRIMS, NO_SYSTEM, FORGETS], ids=["trims", "no system role", "forgets answers"])
def test_a_template_that_does_more_is_left_to_jinja(tokenizer, template: str):
    tokenizer.chat_template = template
    assert probe(tokenizer, parity.CONVERSATIONS.values()) is None


def test_the_bos_token_is_taken_off_for_a_runtime_that_adds_it(tokenizer):
    tokenizer.chat_template, bos = BOS, tokenizer.bos_token
    turns = probe(tokenizer, parity.CONVERSATIONS.values())
    stripped = turns.without_bos(bos)
    for messages in parity.CONVERSATIONS.values():
        assert bos + stripped.render(messages) == turns.render(messages)
    tokenizer.chat_template = ROLES
    assert probe(tokenizer, parity.CONVERSATIONS.values()).without_bos(bos) is None


@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(max_size=20), min_size=1, max_size=5), st.none() | st.text(max_size=20))
def test_any_conversation_renders_alike(tokenizer, texts: list[str], system: str | None):
    turns = probe(tokenizer, parity.CONVERSATIONS.values())
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    assert turns.render(messages) == render(tokenizer, messages)
    assert run_go(turns.go(), messages) == render(tokenizer, messages)


GO = """package main
import ("encoding/json"; "os"; "text/template")
type Message struct { Role, Content string }
func main() {
  var in struct { Template string; Talks [][]Message }
  if err := json.NewDecoder(os.Stdin).Decode(&in); err != nil { panic(err) }
  t := template.Must(template.New("").Parse(in.Template))
  for _, talk := range in.Talks {
    if err := t.Execute(os.Stdout, map[string]any{"Messages": talk}); err != nil { panic(err) }
    os.Stdout.WriteString("\\x00")
  }
}
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("go") is None, reason="needs a Go compiler")
@pytest.mark.parametrize("template", [None, QUOTES], ids=["smollm2", "quotes"])
def test_go_itself_renders_the_same(tokenizer, template: str | None, tmp_path: Path):
    tokenizer.chat_template = template or tokenizer.chat_template
    prompt_format: PromptFormat = probe(tokenizer, parity.CONVERSATIONS.values())
    talks = list(parity.CONVERSATIONS.values())
    (tmp_path / "main.go").write_text(GO)
    found = subprocess.run(
        ["go", "run", "main.go"], cwd=tmp_path, capture_output=True, check=True,
        input=json.dumps({"Template": prompt_format.go(), "Talks": talks}).encode(),
    )  # fmt: skip
    assert found.stdout.decode().split("\0")[:-1] == [render(tokenizer, talk) for talk in talks]
