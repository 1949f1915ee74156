"""GGUF in llama.cpp: a thin wrapper of the low-level API, greedy answers in batches, logits of windows.

Nothing is copied out of llama.cpp: `decode` returns a view of its logits that holds until the next call.
The arithmetic is llama.cpp's own with its default options, as in the programs that will serve the file.
"""

import contextlib
import ctypes
import io
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tasks.errors import ArtifactError, StageError
from tasks.models import sizes
from tasks.models.chat import Messages
from tasks.runtimes.protocol import Hopeless, Logits, PromptReader, Step

SLOTS = 32  # answers generated side by side
# Attention works through the cache in steps of so many cells, up to the last one in use, whoever's they are: a batch
# that ends just before such a step is the fastest one (q8_0 of 135 M parameters, CPU milliseconds a token: 1.49 with
# 240 tokens and 256 cells, 1.55 with 496 and 512, 1.74 with 1008 and 1024; 2.3 in micro-batches of 48).
STEP = 256
FILL = 512  # tokens of prompts with which answers begin to be generated side by side
LEAST = 128  # tokens of drafts checked in one call, at least
# From 64 tokens in a micro-batch up attention takes another path, with other rounding. Activations are rounded to 8 bits
# before they meet quantized weights, so that a last-bit difference may decide between two tokens that are about equally
# likely. The same rows are batched in the same way on every run, whatever the threads, so equal work gives equal bytes.


class Session:
    """One GGUF loaded with one context, closed by `with`.

    `cells` is the size of the KV cache in tokens, shared by `sequences` sequences; `batch` tokens may be given
    to one `decode`, which computes them in micro-batches of `micro`. With more than one sequence the last
    one is the wrapper's own.
    """

    def __init__(
        self, file: Path, *, threads: int, cells: int, sequences: int = 1, batch: int = 512, micro: int = 512
    ) -> None:
        import llama_cpp

        self._api = llama_cpp
        # The binding prints what passes its logger's level on standard error.
        logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
        self._model = self._context = None
        llama_cpp.llama_backend_init()
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors):
            self._model = llama_cpp.llama_model_load_from_file(
                str(file).encode(), llama_cpp.llama_model_default_params()
            )
        if not self._model:
            raise ArtifactError(f"{file}: llama.cpp cannot load it: {_last_line(errors)}: make the file again")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = cells, batch, min(batch, micro)
        params.n_seq_max, params.kv_unified = sequences, True
        params.n_threads = params.n_threads_batch = threads
        params.no_perf = True
        with contextlib.redirect_stderr(errors):
            self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            self.close()
            raise StageError(f"{file}: llama.cpp cannot make a context of {cells} tokens: {_last_line(errors)}")
        self._file = file
        self._micro = micro
        self._spare = sequences - 1
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self.vocabulary_size: int = llama_cpp.llama_vocab_n_tokens(self._vocabulary)

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the native memory; the views returned before are void from here."""
        if self._context:
            self._api.llama_free(self._context)
        if self._model:
            self._api.llama_model_free(self._model)
        self._context = self._model = None

    def decode(
        self, tokens: Sequence[int], positions: Sequence[int], sequences: Sequence[int], wanted: Sequence[bool]
    ) -> Logits:
        """Logits (wanted tokens, vocabulary) of one batch, in batch order; a view, valid until the next call.

        Raises:
            StageError: llama.cpp refuses the batch.
        """
        import numpy as np

        # A lone token in a micro-batch takes another path still, one that depends on the number of threads.
        padding = [0] if self._spare and len(tokens) % self._micro == 1 else []
        token, position = np.array([*tokens, *padding], np.int32), np.array([*positions, *padding], np.int32)
        sequence = np.array([*sequences, *(self._spare for _ in padding)], np.int32)
        want = np.array([*wanted, *padding], np.int8)
        one = np.ones(len(token), np.int32)
        address = sequence.ctypes.data + sequence.itemsize * np.arange(len(token), dtype=np.uint64)
        batch = self._api.llama_batch(
            n_tokens=len(token),
            token=_pointer(token, ctypes.c_int32),
            pos=_pointer(position, ctypes.c_int32),
            n_seq_id=_pointer(one, ctypes.c_int32),
            seq_id=_pointer(address, ctypes.POINTER(ctypes.c_int32)),
            logits=_pointer(want, ctypes.c_int8),
        )
        code = self._api.llama_decode(self._context, batch)
        if code != 0:
            raise StageError(f"{self._file}: llama.cpp stopped with code {code} on a batch of {len(token)} tokens")
        if padding:
            self.forget(self._spare)
        shape = (int(want.sum()), self.vocabulary_size)
        if not shape[0]:
            return np.empty(shape, np.float32)
        return np.ctypeslib.as_array(self._api.llama_get_logits(self._context), shape)

    def clear(self) -> None:
        """Forget every sequence."""
        self._api.llama_memory_clear(self._memory, False)

    def forget(self, sequence: int) -> None:
        """Free the cells that only this sequence uses."""
        self._api.llama_memory_seq_rm(self._memory, sequence, -1, -1)

    def share(self, source: int, sequence: int) -> None:
        """Let `sequence` begin with what `source` holds; no cell is copied."""
        self._api.llama_memory_seq_cp(self._memory, source, sequence, -1, -1)

    def tokenize(self, text: str) -> list[int]:
        """Ids of plain text by the file's own vocabulary, with BOS where the model wants one."""
        raw = text.encode()
        ids = (ctypes.c_int32 * (len(raw) + 16))()
        count = self._api.llama_tokenize(self._vocabulary, raw, len(raw), ids, len(ids), True, False)
        if count < 0:
            raise StageError(f"{self._file}: llama.cpp cannot tokenise the text")
        return list(ids[:count])

    def window_start(self) -> int | None:
        """The BOS token that replaces a window's first one, where the model wants it."""
        wants = self._api.llama_vocab_get_add_bos(self._vocabulary)
        return int(self._api.llama_vocab_bos(self._vocabulary)) if wants else None


def _pointer(array: Any, kind: Any) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(kind))


def _last_line(text: io.StringIO) -> str:
    lines = [line.strip() for line in text.getvalue().splitlines() if line.strip()]
    return lines[-1] if lines else "it gives no reason"


class Windows:
    """`windows(window, first)`: logits of every position from `first` on but the last, (n, vocabulary)."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def __call__(self, window: Sequence[int], first: int) -> Logits:
        self.session.clear()
        wanted = [first <= i < len(window) - 1 for i in range(len(window))]
        return self.session.decode(window, range(len(window)), [0] * len(window), wanted)


@contextmanager
def window_logits(file: Path, context: int, threads: int) -> Iterator[Windows]:
    """Load `file` for windows of at most `context` tokens, micro-batched as llama-perplexity does it."""
    with Session(file, threads=threads, cells=context, batch=context) as session:
        yield Windows(session)


def answers(
    file: Path,
    prompts: Sequence[Sequence[int]],
    drafts: Sequence[Sequence[int]],
    *,
    stops: Sequence[int],
    limit: int,
    threads: int,
    advance: Callable[[int], None],
    hopeless: Hopeless = lambda row, answer: False,
) -> list[list[int]]:
    """What greedy decoding generates for each prompt, without its stop token, at most `limit` tokens.

    An answer that is `hopeless` is cut where that is certain.

    `drafts` (each ending with a stop token) only speed it up: a whole draft is decoded in one pass, and as
    long as the most likely token is the draft's, it is what greedy decoding would have generated (speculative
    decoding, Leviathan et al. 2023, with the reference for a draft). A row goes on alone where they part.
    """
    shared = _common_prefix(prompts)
    longest = max(map(len, prompts)) - shared + limit
    slots = min(SLOTS, max(1, (first_context(file) - 1 - shared) // longest))
    cells = shared + slots * longest
    budget = _budget(shared)
    batch = max(budget, FILL, longest, shared) + 1
    with Session(file, threads=threads, cells=cells + 1, sequences=slots + 2, batch=batch, micro=batch) as session:
        if shared:
            session.decode(prompts[0][:shared], range(shared), [0] * shared, [False] * shared)
        rows = [(list(prompt[shared:]), list(draft[:limit])) for prompt, draft in zip(prompts, drafts, strict=True)]
        done, open_rows = _check_drafts(session, rows, shared, stops, limit, slots, hopeless, advance)
        _finish(session, rows, shared, done, open_rows, stops, limit, slots, hopeless, advance)
    return done


def stepper(file: Path, threads: int, cells: int) -> Step:
    """What is timed: one sequence of at most `cells` tokens."""
    session = Session(file, threads=threads, cells=cells)

    def step(tokens: Sequence[int], position: int) -> int:
        if position == 0:
            session.clear()
        wanted = [False] * (len(tokens) - 1) + [True]
        logits = session.decode(tokens, range(position, position + len(tokens)), [0] * len(tokens), wanted)
        return int(logits[0].argmax())

    return step


def prompt_reader(path: Path) -> PromptReader:
    """llama-cpp-python's server when told `chat_format=chat_template.default`: the GGUF's Jinja template.

    Without that setting the server recognises some templates by their text and replaces them by built-in
    formatters, which differ (its `chatml` always writes a system turn and loses empty contents).

    Raises:
        ArtifactError: the GGUF has no chat template or cannot be read.
    """
    import llama_cpp
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    try:
        llama = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    except ValueError as error:
        raise ArtifactError(f"{path}: llama.cpp cannot read it ({error}): run `quantize` again") from error
    vocab = llama_cpp.llama_model_get_vocab(llama.model)
    template = llama.metadata.get("tokenizer.chat_template")
    if not template:
        raise ArtifactError(f"{path} has no chat template in its metadata: run `convert` and `quantize` again")

    def text(token: int) -> str:
        return llama_cpp.llama_vocab_get_text(vocab, token).decode() if token != -1 else ""

    formatter = Jinja2ChatFormatter(template, eos_token=text(llama.token_eos()), bos_token=text(llama.token_bos()))

    def ids(messages: Messages) -> list[int]:
        prompt: str = formatter(messages=messages).prompt
        found: list[int] = llama.tokenize(prompt.encode(), add_bos=False, special=True)
        return found

    ends = frozenset(i for i in range(llama.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocab, i))
    return PromptReader(ids, ends, bool(llama_cpp.llama_vocab_get_add_bos(vocab)))


# The program itself, its libraries and small buffers, in bytes: resident memory that the terms below leave over, rounded up,
# measured with llama-cpp-python 0.3.36's server on x86-64.
OVERHEAD = 160_000_000
AT_ONCE = 512  # tokens that llama.cpp computes at once


def minimum_memory(weights: int, config: Mapping[str, Any], context: int) -> int:
    """Bytes resident while one conversation fills the context: weights that are mapped once, a key-value cache in float16,
    and for 512 tokens at once attention scores (heads x tokens x context floats) and activations. The last token's logits
    alone are kept (`logits_all` is off in the bundle).

    A 30-layer 135M model: 352 MB at 2,048 tokens from a 98 MB GGUF, 298 MB measured.

    Raises:
        ArtifactError: the configuration lacks one of the sizes.
    """
    heads, hidden, inner = sizes.widths(config, "num_attention_heads", "hidden_size", "intermediate_size")
    scratch = 4 * AT_ONCE * (heads * context + 2 * (hidden + inner))
    return weights + 2 * sizes.cached_values(config, context) + scratch + OVERHEAD


def first_context(file: Path) -> int:
    """Tokens above which llama.cpp gives a model that has two rotary embeddings (Phi) the one for long texts.

    It goes by the whole cache, however short the sequences in it are.
    """
    import llama_cpp

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    settings = llama_cpp.llama_model_default_params()
    settings.vocab_only = True
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        model = llama_cpp.llama_model_load_from_file(str(file).encode(), settings)
    if not model:
        raise ArtifactError(f"{file}: llama.cpp cannot load it: {_last_line(errors)}: make the file again")
    text = ctypes.create_string_buffer(32)
    key = b"phi3.rope.scaling.original_context_length"
    size = llama_cpp.llama_model_meta_val_str(model, key, text, len(text))
    llama_cpp.llama_model_free(model)
    return int(text.value) if size > 0 else sys.maxsize


def _common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with; at least one token of each prompt is left over."""
    first, last = min(map(list, prompts)), max(map(list, prompts))
    most = min(map(len, prompts)) - 1
    return next((i for i in range(most) if first[i] != last[i]), most)


def _check_drafts(
    session: Session,
    rows: Sequence[tuple[list[int], list[int]]],
    shared: int,
    stops: Sequence[int],
    limit: int,
    slots: int,
    hopeless: Hopeless,
    advance: Callable[[int], None],
) -> tuple[list[list[int]], list[int]]:
    """Accepted tokens of every row, and the rows that must go on generating."""
    accepted: list[list[int]] = [[] for _ in rows]
    open_rows = []
    for group in _groups([len(prompt) + len(draft) - 1 for prompt, draft in rows], slots, _budget(shared)):
        tokens: list[int] = []
        positions: list[int] = []
        sequences: list[int] = []
        wanted: list[bool] = []
        for slot, row in enumerate(group, start=1):
            prompt, draft = rows[row]
            fed = prompt + draft[:-1]
            tokens += fed
            positions += range(shared, shared + len(fed))
            sequences += [slot] * len(fed)
            wanted += [i >= len(prompt) - 1 for i in range(len(fed))]
            session.share(0, slot)
        best = session.decode(tokens, positions, sequences, wanted).argmax(axis=1).tolist()
        for slot, row in enumerate(group, start=1):
            draft = rows[row][1]
            mine, best = best[: len(draft)], best[len(draft) :]
            if _accept(mine, draft, accepted[row], stops, limit) or hopeless(row, accepted[row]):
                advance(1)
            else:
                open_rows.append(row)
            session.forget(slot)
    return accepted, open_rows


def _budget(shared: int) -> int:
    """Tokens of drafts of one call: with the shared beginning, and a cell of the wrapper's own, they fill whole steps."""
    return -(shared + 1 + LEAST) // STEP * -STEP - shared - 1


def _groups(lengths: Sequence[int], slots: int, budget: int) -> Iterator[list[int]]:
    """Indices in batches of at most `budget` tokens and so many rows; longest first, so that batches fill up."""
    group: list[int] = []
    total = 0
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        if group and (total + lengths[row] > budget or len(group) == slots):
            yield group
            group, total = [], 0
        group.append(row)
        total += lengths[row]
    if group:
        yield group


def _accept(best: Sequence[int], draft: Sequence[int], accepted: list[int], stops: Sequence[int], limit: int) -> bool:
    """Take over tokens up to and with the first that differs from the draft; whether the answer is complete."""
    for token, drafted in zip(best, draft, strict=True):
        if token in stops:
            return True
        accepted.append(token)
        if token != drafted:
            break
    return len(accepted) >= limit


def _finish(
    session: Session,
    rows: Sequence[tuple[list[int], list[int]]],
    shared: int,
    done: list[list[int]],
    waiting: Sequence[int],
    stops: Sequence[int],
    limit: int,
    slots: int,
    hopeless: Hopeless,
    advance: Callable[[int], None],
) -> None:
    """Generate token by token, up to `slots` answers side by side.

    A finished answer's cells are not given to another one before all are finished: cells out of order would
    be summed in another order, which rounds differently.
    """
    for group in _groups([len(rows[row][0]) + len(done[row]) for row in waiting], slots, FILL):
        active = {slot: waiting[index] for slot, index in enumerate(group, start=1)}
        held = list(active)
        fed = {slot: rows[row][0] + done[row] for slot, row in active.items()}
        for slot in held:
            session.share(0, slot)
        while active:
            tokens: list[int] = []
            positions: list[int] = []
            sequences: list[int] = []
            wanted: list[bool] = []
            for slot, row in active.items():
                end = shared + len(rows[row][0]) + len(done[row])
                tokens += fed[slot]
                positions += range(end - len(fed[slot]), end)
                sequences += [slot] * len(fed[slot])
                wanted += [False] * (len(fed[slot]) - 1) + [True]
            best = session.decode(tokens, positions, sequences, wanted).argmax(axis=1).tolist()
            for (slot, row), token in zip(list(active.items()), best, strict=True):
                fed[slot] = [token]
                if token not in stops:
                    done[row].append(token)
                if token in stops or len(done[row]) >= limit or hopeless(row, done[row]):
                    del active[slot]
                    advance(1)
        for slot in held:
            session.forget(slot)
