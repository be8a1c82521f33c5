"""Text to token ids and back, rebuilt from what a GGUF file or a Hugging Face folder holds."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from examples.models import inputs
from ferrum_jax.checks import INT32_LIMIT, check_count

SMOLLM_SYSTEM_LINE = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
# Kinds of tokens in the GGUF specification.
NORMAL_TOKEN, CONTROL_TOKEN, USER_DEFINED_TOKEN = 1, 3, 4
SPACE = "\u2581"  # SentencePiece writes a space as this character.
DAMAGED = "Download the model again."

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A tokenizer, with the special tokens and the template that a chat needs.

    Attributes:
      backend: The BPE itself.
      eos_token_ids: Ids that end an answer.
      bos_token: Text of the token that starts a sequence, if the model has one.
      eos_token: Text of the token that ends one, if the model has one.
      adds_bos: Whether `encode` puts `bos_token` first.
      chat_template: The model's own Jinja template; ChatML if absent.
      template_path: The file that holds the template.
    """

    backend: tokenizers.Tokenizer
    eos_token_ids: tuple[int, ...]
    bos_token: str | None = None
    eos_token: str | None = None
    adds_bos: bool = False
    chat_template: str | None = None
    template_path: pathlib.Path | None = None

    def encode(self, text: str) -> list[int]:
        """Turns text into token ids; special tokens may be spelled out in it.

        Args:
          text: Any text, for instance the result of `apply_chat`.

        Returns:
          Token ids. A model that wants its start token gets it exactly once.

        Raises:
          ValueError: If the text has a lone surrogate, or the tokenizer fails on it.
        """
        inputs.check_text("the text", text)
        if self.adds_bos and self.bos_token and not text.startswith(self.bos_token):
            text = self.bos_token + text
        with inputs.foreign("encoding with the model's tokenizer", DAMAGED):
            return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Turns token ids into text, special tokens left out.

        Args:
          token_ids: Ids below the vocabulary's size.

        Returns:
          The text; an incomplete UTF-8 character at the end shows as U+FFFD.
        """
        return self.backend.decode(list(token_ids), skip_special_tokens=True)

    def apply_chat(self, text: str, system: str | None = None) -> str:
        """Wraps one user message in the model's chat template.

        Args:
          text: What the user says.
          system: The system prompt; the model's default if absent.

        Returns:
          A prompt that ends where the assistant's answer begins.

        Raises:
          ValueError: If the model's template cannot be rendered; the text names its file.
          ImportError: If the model has a template and Jinja2 is not installed.
        """
        if self.chat_template is None:
            return (
                f"<|im_start|>system\n{system or SMOLLM_SYSTEM_LINE}<|im_end|>\n"
                f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
            )
        instructions = [] if system is None else [{"role": "system", "content": system}]
        with inputs.naming(self.template_path):
            return _render(
                self.chat_template,
                messages=[*instructions, {"role": "user", "content": text}],
                bos_token=self.bos_token or "",
                eos_token=self.eos_token or "",
            )


def from_gguf(path: pathlib.Path, fields: Mapping[str, Any]) -> Tokenizer:
    """Builds the tokenizer that a GGUF file describes.

    Args:
      path: The file, which also holds the chat template.
      fields: Metadata of the file, as `key -> value`.

    Returns:
      The tokenizer.

    Raises:
      ValueError: If the file's tokenizer is not a BPE known here, or is damaged.
    """
    kind = fields.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ValueError(
            f"tokenizer.ggml.model is {kind!r}; byte-level BPE ('gpt2') and SentencePiece BPE "
            "('llama') are read. Pass a Hugging Face folder with tokenizer.json instead."
        )
    tokens = _texts(fields, "tokenizer.ggml.tokens")
    types = fields.get("tokenizer.ggml.token_type", [])
    if not isinstance(types, list):
        raise ValueError(f"tokenizer.ggml.token_type must be a list. {DAMAGED}")
    pre = fields.get("tokenizer.ggml.pre", "gpt-2")
    if kind == "gpt2":
        backend = _byte_level_bpe(tokens, _texts(fields, "tokenizer.ggml.merges"), pre)
    else:
        backend = _sentence_piece_bpe(tokens, types, fields)
    for token_type in (CONTROL_TOKEN, USER_DEFINED_TOKEN):
        is_special = token_type == CONTROL_TOKEN  # Decoding leaves special tokens out.
        if kind == "llama" or is_special:
            added = [token for token, x in zip(tokens, types, strict=False) if x == token_type]
            backend.add_tokens(
                [tokenizers.AddedToken(x, special=is_special, normalized=False) for x in added]
            )

    def token_id(name: str) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        if fields.get(key) is not None:
            check_count(key, fields[key], minimum=0, limit=len(tokens))
        return fields.get(key)

    bos = token_id("bos")
    ends = [end for end in (token_id("eos"), token_id("eot")) if end is not None]
    template = fields.get("tokenizer.chat_template")
    return Tokenizer(
        backend=backend,
        eos_token_ids=tuple(dict.fromkeys(ends)),
        bos_token=None if bos is None else tokens[bos],
        eos_token=tokens[ends[0]] if ends else None,
        adds_bos=bool(fields.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe")),
        chat_template=_check_template(template),
        template_path=path,
    )


def from_folder(folder: pathlib.Path) -> Tokenizer:
    """Reads the tokenizer of a Hugging Face model folder.

    Args:
      folder: Holds tokenizer.json and, usually, tokenizer_config.json and config.json.

    Returns:
      The tokenizer.

    Raises:
      FileNotFoundError: If tokenizer.json is missing.
      ValueError: If a file is damaged or has a wrong field; the text names the file.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{folder} has no tokenizer.json. Save the model's fast tokenizer into the folder."
        )
    with inputs.naming(path), inputs.foreign("reading the tokenizer", DAMAGED):
        backend = tokenizers.Tokenizer.from_file(str(path))
    settings_path = folder / "tokenizer_config.json"
    settings = inputs.read_object(settings_path)
    with inputs.naming(settings_path):
        bos, eos = (_token_text(f"{name}_token", settings) for name in ("bos", "eos"))
    template, template_path = settings.get("chat_template"), settings_path
    if template is None and (folder / "chat_template.jinja").exists():
        template_path = folder / "chat_template.jinja"
        template = inputs.read_text(template_path)
    with inputs.naming(template_path):
        template = _check_template(template)

    bos_id = None if bos is None else backend.token_to_id(bos)
    adds_bos = False
    if bos_id is not None:
        with inputs.naming(path), inputs.foreign("encoding with the tokenizer", DAMAGED):
            adds_bos = backend.encode("a").ids[:1] == [bos_id]
    return Tokenizer(
        backend=backend,
        eos_token_ids=_end_ids(folder, None if eos is None else backend.token_to_id(eos)),
        bos_token=bos,
        eos_token=eos,
        adds_bos=adds_bos,
        chat_template=template,
        template_path=template_path,
    )


def _end_ids(folder: pathlib.Path, default: int | None) -> tuple[int, ...]:
    """Returns the ids that end an answer, from the first file that names any."""
    for name in ("generation_config.json", "config.json"):
        ends = inputs.read_object(folder / name).get("eos_token_id")
        if ends is not None:
            ends = ends if isinstance(ends, list) else [ends]
            with inputs.naming(folder / name):
                for end in ends:
                    check_count("eos_token_id", end, minimum=0, limit=INT32_LIMIT)
            return tuple(ends)
    return () if default is None else (default,)


def _byte_level_bpe(tokens: Sequence[str], lines: Sequence[str], pre: Any) -> tokenizers.Tokenizer:
    """Builds a byte-level BPE; `pre` is the GGUF's name for how text is split before merging."""
    with inputs.foreign("building the tokenizer", DAMAGED):
        backend = tokenizers.Tokenizer(
            models.BPE(
                vocab={token: token_id for token_id, token in enumerate(tokens)},
                merges=[(first, second) for first, second in (x.split(" ", 1) for x in lines)],
                ignore_merges=pre == "llama-bpe",
            )
        )
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre in ("gpt-2", "default"):
        cut = gpt2
    elif pre == "smollm":  # Every digit is its own token.
        cut = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    elif pre == "llama-bpe":
        words = pre_tokenizers.Split(tokenizers.Regex(LLAMA3_PATTERN), "isolated")
        raw_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        cut = pre_tokenizers.Sequence([words, raw_bytes])
    else:
        raise ValueError(
            f"cuts text by the rule {pre!r}; known rules are 'smollm', 'gpt-2' and "
            "'llama-bpe'. Pass a Hugging Face folder with tokenizer.json instead."
        )
    backend.pre_tokenizer = cut
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentence_piece_bpe(
    tokens: Sequence[str], types: Sequence[Any], fields: Mapping[str, Any]
) -> tokenizers.Tokenizer:
    """Builds a SentencePiece BPE, which merges the two neighbours with the best-scored token.

    The merges are not in the file: each pair of tokens that make another token is one, and the
    scores order them.
    """
    with inputs.foreign("building the tokenizer", DAMAGED):
        scores = list(map(float, fields["tokenizer.ggml.scores"]))
        normal = {
            token: score
            for token, score, kind in zip(tokens, scores, types, strict=True)
            if kind == NORMAL_TOKEN
        }
        merges = [
            (token[:cut], token[cut:])
            for token in sorted(normal, key=lambda token: -normal[token])
            for cut in range(1, len(token))
            if token[:cut] in normal and token[cut:] in normal
        ]
        backend = tokenizers.Tokenizer(
            models.BPE(
                vocab={token: token_id for token_id, token in enumerate(tokens)},
                merges=merges,
                byte_fallback=True,
                fuse_unk=True,
            )
        )
    first = [normalizers.Prepend(SPACE)] * bool(fields.get("tokenizer.ggml.add_space_prefix", True))
    backend.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", SPACE)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return backend


def _render(template: str, **values: Any) -> str:
    """Renders a chat template in a sandbox, since templates are untrusted code."""
    try:
        from jinja2 import sandbox
    except ImportError as error:
        raise ImportError(
            "The model brings its own chat template, and Jinja2 is not installed to render it. "
            "Run `pip install jinja2`, or pass the prompt as plain text."
        ) from error

    def raise_exception(message: str) -> None:
        raise ValueError(f"The model's chat template refuses this conversation: {message}")

    environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    with inputs.foreign("rendering the chat template", "Pass a model with a working template."):
        text = environment.from_string(template).render(add_generation_prompt=True, **values)
    return inputs.check_text("the rendered chat template", text)


def _check_template(template: Any) -> str | None:
    """Returns a chat template as text; of several named ones, the default."""
    if isinstance(template, list):
        named = [item for item in template if isinstance(item, dict)]
        template = next((x.get("template") for x in named if x.get("name") == "default"), None)
    return None if template is None else inputs.check_text("chat_template", template)


def _token_text(name: str, settings: Mapping[str, Any]) -> str | None:
    """Returns the text of a token, which is stored bare or inside an object."""
    token = settings.get(name)
    if isinstance(token, dict):
        token = token.get("content")
    return None if token is None else inputs.check_text(name, token)


def _texts(fields: Mapping[str, Any], name: str) -> list[str]:
    """Returns a list of texts among the fields of a GGUF file."""
    texts = fields.get(name)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} must be a list of texts. {DAMAGED}")
    return texts
