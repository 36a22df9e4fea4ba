"""Tokenizer and IncrementalDetokenizer against the libraries they stand in for."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from disagg.config import BUNDLED_MODEL
from disagg.errors import ConfigError, InvalidRequestError
from disagg.service.tokenizer import IncrementalDetokenizer, Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog. " * 3,
    "naïve café 你好世界 🙂🙃 γειά",
    "1234 + 56 = 1290",
]
SPECIAL = ["<|bos|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content }}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Loops, controls, filters, namespaces and the functions that real templates use.
ELABORATE = """
{{- bos_token }}
{%- set ns = namespace(n=0) %}
{%- for message in messages %}
    {%- if message['role'] not in ['user', 'assistant', 'system'] %}
        {{- raise_exception('bad role') }}
    {%- endif %}
    {%- if loop.index0 > 5 %}{% break %}{% endif %}
    {%- set ns.n = ns.n + 1 %}
    {%- generation %}[{{ message | tojson }}]{% endgeneration %}
  {% if message.content | length > 3 %}
  long {{ ns.n }}: {{ message.content | trim }}
  {% endif %}
{%- endfor %}
{{ tools is none }} {{ strftime_now('%Y') | length }}
{%- if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}
{%- if add_generation_prompt %}{{ eos_token }}assistant:{% endif %}
"""


def byte_level_tokenizer() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer=trainer)
    # Outside the byte alphabet, partly, and inside it but no UTF-8 there: each is read differently.
    tokenizer.add_special_tokens(["<｜end▁of▁text｜>"])
    tokenizer.add_tokens(["né◊e", "two words", "café"])
    return tokenizer


def sentencepiece_tokenizer() -> tokenizers.Tokenizer:
    """As Llama 2's: no pre-tokenizer, spaces as U+2581, bytes for what the vocabulary lacks."""
    specials = {"<unk>": 0, "<s>": 1, "</s>": 2}
    byte_tokens = {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    chars = sorted(set("▁abcdefghijklmnopqrstuvwxyzTH.,!é"))
    vocab = {**specials, **byte_tokens, **{char: 259 + i for i, char in enumerate(chars)}}
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "a"), ("l", "l"), ("▁", "▁")]
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(list(specials))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def save(tokenizer: tokenizers.Tokenizer, folder: Path, **config: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    base = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**base, **config}))
    return folder


@pytest.fixture(scope="module")
def byte_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(
        byte_level_tokenizer(),
        tmp_path_factory.mktemp("byte"),
        bos_token="<|bos|>",
        eos_token={"content": "<|im_end|>", "__type": "AddedToken"},
        chat_template=CHATML,
    )


@pytest.fixture(scope="module")
def piece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(
        sentencepiece_tokenizer(), tmp_path_factory.mktemp("piece"), bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="module", params=["byte", "piece"])
def tokenizer(request: pytest.FixtureRequest, byte_folder: Path, piece_folder: Path) -> Tokenizer:
    return Tokenizer(byte_folder if request.param == "byte" else piece_folder)


def hugging_face(folder: Path):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


# -- detokenisation --------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32), skip=st.booleans())
def test_joined_pieces_equal_the_whole_for_any_ids(
    tokenizer: Tokenizer, data: st.DataObject, seed: int, skip: bool
) -> None:
    """Ids at random are mostly broken UTF-8; ids beyond the vocabulary have no text."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=40))
    pieces = cut(ids, random.Random(seed))
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
    text = "".join(detokenizer.push(piece) for piece in pieces) + detokenizer.flush()
    assert text == tokenizer.decode(ids, skip_special_tokens=skip)


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=60), seed=st.integers(0, 2**32))
@example(text="🙂👩‍👩‍👧‍👦é你", seed=0)
def test_no_broken_character_is_ever_shown(tokenizer: Tokenizer, text: str, seed: int) -> None:
    ids = tokenizer.encode(text)
    detokenizer = IncrementalDetokenizer(tokenizer)
    whole = tokenizer.decode(ids)
    shown = ""
    for piece in cut(ids, random.Random(seed)):
        shown += detokenizer.push(piece)
        assert whole.startswith(shown)
    assert shown + detokenizer.flush() == whole


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_byte_level_round_trips_any_text(byte_folder: Path, text: str) -> None:
    tokenizer = Tokenizer(byte_folder)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


def test_characters_come_as_soon_as_they_are_whole(byte_folder: Path) -> None:
    tokenizer = Tokenizer(byte_folder)
    ids = [tokenizer.encode(chr(byte))[0] for byte in b"ab"]
    smile = [
        next(i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == bytes([byte]))
        for byte in "🙂".encode()
    ]
    detokenizer = IncrementalDetokenizer(tokenizer)
    pushed = [detokenizer.push([token]) for token in [ids[0], *smile, ids[1]]]
    assert pushed == ["a", "", "", "", "🙂", "b"]


def test_special_tokens_show_only_if_asked_for(byte_folder: Path) -> None:
    tokenizer = Tokenizer(byte_folder)
    ids = tokenizer.encode("fox<|im_end|>dog")
    hidden = IncrementalDetokenizer(tokenizer)
    shown = IncrementalDetokenizer(tokenizer, skip_special_tokens=False)
    assert hidden.push(ids) == "foxdog"
    assert shown.push(ids) == "fox<|im_end|>dog"


def test_cost_per_token_does_not_grow(tokenizer: Tokenizer) -> None:
    """Counts what the library decodes, not time: a thousand tokens in, a few each out."""
    decoded = 0
    original = tokenizer.decode

    def counting(ids: list[int], *, skip_special_tokens: bool = True) -> str:
        nonlocal decoded
        decoded += len(ids)
        return original(ids, skip_special_tokens=skip_special_tokens)

    tokenizer.decode = counting
    try:
        detokenizer = IncrementalDetokenizer(tokenizer)
        ids = tokenizer.encode("all the talk é 你 of " * 60)
        for token in ids:
            detokenizer.push([token])
    finally:
        del tokenizer.decode
    assert decoded <= 4 * len(ids)


# -- encoding --------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "Hello", " The fox<|im_end|> café 你好 🙂\n\n", "<s>tail the</s> "])
@pytest.mark.parametrize("special", [True, False])
def test_ids_equal_those_of_transformers(
    byte_folder: Path, piece_folder: Path, text: str, special: bool
) -> None:
    for folder in (byte_folder, piece_folder):
        expected = hugging_face(folder).encode(text, add_special_tokens=special)
        assert Tokenizer(folder).encode(text, add_special_tokens=special) == expected


@pytest.mark.parametrize(
    "flags", [{}, {"add_bos_token": True}, {"add_bos_token": False}, {"add_eos_token": True}]
)
def test_bos_and_eos_as_transformers_adds_them(tmp_path: Path, flags: dict[str, bool]) -> None:
    config = {"bos_token": "<s>", "eos_token": "</s>", **flags}
    folder = save(sentencepiece_tokenizer(), tmp_path, **config)
    tokenizer = Tokenizer(folder)
    assert tokenizer.encode("the all") == hugging_face(folder).encode("the all")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


def test_vocabulary(byte_folder: Path) -> None:
    tokenizer = Tokenizer(byte_folder)
    assert tokenizer.vocab_size == len(hugging_face(byte_folder))
    end = tokenizer.encode("<｜end▁of▁text｜>")
    assert tokenizer.special_ids == {0, 1, 2, *end} and len(end) == 1
    assert tokenizer.token_bytes(10**6) == b"" and tokenizer.token_string(10**6) is None
    assert tokenizer.token_text(1) == "<|im_start|>"


def test_length_bound_never_refuses_what_fits(tokenizer: Tokenizer) -> None:
    text = "The quick brown fox " * 20
    assert tokenizer.can_fit(text, len(tokenizer.encode(text)))
    assert not tokenizer.can_fit("a" * 10**6, 100)


def test_folder_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError):
        Tokenizer(tmp_path)


# -- chat templates --------------------------------------------------------------------------------

CHAT = [
    {"role": "system", "content": "Be <brief> & kind"},
    {"role": "user", "content": "  Wie geht's? 你好 "},
    {"role": "assistant", "content": "Ok"},
]


@pytest.mark.parametrize("template", [CHATML, ELABORATE], ids=["chatml", "elaborate"])
@pytest.mark.parametrize("generation_prompt", [True, False])
@pytest.mark.parametrize("where", ["config", "named", "file"])
def test_chat_equals_transformers(tmp_path: Path, template: str, generation_prompt: bool, where: str) -> None:
    config: dict[str, object] = {"bos_token": "<|bos|>", "eos_token": "<|im_end|>"}
    if where == "config":
        config["chat_template"] = template
    elif where == "named":
        config["chat_template"] = [{"name": "default", "template": template}, {"name": "x", "template": "y"}]
    folder = save(byte_level_tokenizer(), tmp_path, **config)
    if where == "file":
        (folder / "chat_template.jinja").write_text(template)
    expected = hugging_face(folder).apply_chat_template(
        CHAT, tokenize=False, add_generation_prompt=generation_prompt
    )
    tokenizer = Tokenizer(folder)
    assert tokenizer.render_chat(CHAT, add_generation_prompt=generation_prompt) == expected
    ids = hugging_face(folder).apply_chat_template(CHAT, add_generation_prompt=generation_prompt)
    assert tokenizer.encode_chat(CHAT, add_generation_prompt=generation_prompt) == ids["input_ids"]


def test_template_variables_reach_the_template(tmp_path: Path) -> None:
    folder = save(byte_level_tokenizer(), tmp_path, chat_template=ELABORATE, eos_token="<|im_end|>")
    expected = hugging_face(folder).apply_chat_template(
        CHAT, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert Tokenizer(folder).render_chat(CHAT, variables={"enable_thinking": False}) == expected
    assert "<think>" in expected


@pytest.mark.parametrize("final", ["Sure, the", "Sure, the  "])
def test_continuing_the_final_message_as_transformers_does(byte_folder: Path, final: str) -> None:
    chat = [*CHAT[:2], {"role": "assistant", "content": final}]
    expected = hugging_face(byte_folder).apply_chat_template(
        chat, tokenize=False, continue_final_message=True
    )
    rendered = Tokenizer(byte_folder).render_chat(
        chat, add_generation_prompt=False, continue_final_message=True
    )
    assert rendered == expected and rendered.rstrip().endswith("Sure, the")


def test_template_that_refuses_names_messages(tmp_path: Path) -> None:
    folder = save(byte_level_tokenizer(), tmp_path, chat_template=ELABORATE)
    with pytest.raises(InvalidRequestError, match="bad role") as caught:
        Tokenizer(folder).encode_chat([{"role": "robot", "content": "x"}])
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10**9) %}x{% endfor %}",
    ],
)
def test_templates_run_in_a_sandbox(tmp_path: Path, template: str) -> None:
    tokenizer = Tokenizer(save(byte_level_tokenizer(), tmp_path, chat_template=template))
    try:
        rendered = tokenizer.render_chat(CHAT)
    except InvalidRequestError:
        return
    # Jinja2 gives an undefined value, shown as nothing, for some unsafe attributes.
    assert rendered == ""


def test_model_without_template(piece_folder: Path) -> None:
    tokenizer = Tokenizer(piece_folder)
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequestError) as caught:
        tokenizer.encode_chat(CHAT)
    assert caught.value.param == "messages"


def test_template_that_is_no_jinja(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        Tokenizer(save(byte_level_tokenizer(), tmp_path, chat_template="{% if %}"))


# -- the bundled model, and what importing costs ---------------------------------------------------


@pytest.mark.skipif(not (BUNDLED_MODEL / "tokenizer.json").exists(), reason="the model is being trained")
def test_bundled_model_equals_transformers() -> None:
    reference, tokenizer = hugging_face(BUNDLED_MODEL), Tokenizer(BUNDLED_MODEL)
    chat = [{"role": "user", "content": 'Hello, what can you do? 12+34=\n{"a": 1} 🙂'}]
    expected = reference.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert tokenizer.encode_chat(chat) == expected
    assert tokenizer.eos_token_id == reference.eos_token_id
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=False)
    assert "".join(detokenizer.push([token]) for token in expected) == reference.decode(expected)


def test_transformers_and_torch_are_not_imported() -> None:
    code = (
        "import sys, disagg.service.tokenizer, disagg.service.text, disagg.client, disagg.cli.chat\n"
        "print([m for m in ('transformers', 'torch', 'ray') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def cut(ids: list[int], rng: random.Random) -> list[list[int]]:
    """Return `ids` in consecutive pieces of random length, some empty."""
    pieces, start = [], 0
    while start < len(ids):
        length = rng.randint(0, 4)
        pieces.append(ids[start : start + length])
        start += length
    return pieces
