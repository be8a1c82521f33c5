"""Text to token ids and back, rebuilt from what a GGUF file or a Hugging Face folder holds."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

SMOLLM_SYSTEM_LINE = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
SPECIAL_TOKEN_TYPE = 3  # "control" in the GGUF specification.

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A tokenizer with the few facts that a chat needs.

    Attributes:
      backend: The byte-level BPE itself.
      eos_token_ids: Ids that end an answer.
      bos_token: Text of the token that starts a sequence, if the model has one.
      eos_token: Text of the token that ends one, if the model has one.
      adds_bos: Whether `encode` puts `bos_token` first.
      chat_template: The model's own Jinja template; ChatML if absent.
    """

    backend: tokenizers.Tokenizer
    eos_token_ids: tuple[int, ...]
    bos_token: str | None = None
    eos_token: str | None = None
    adds_bos: bool = False
    chat_template: str | None = None

    def encode(self, text: str) -> list[int]:
        """Turns text into token ids; special tokens may be spelled out in it.

        Args:
          text: Any text, for instance the result of `apply_chat`.

        Returns:
          Token ids. A model that wants its start token gets it exactly once.
        """
        if self.adds_bos and self.bos_token and not text.startswith(self.bos_token):
            text = self.bos_token + text
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
        """Wraps one user message the way the model was taught to read it.

        Args:
          text: What the user says.
          system: What the model is told before; the model's own line if absent.

        Returns:
          A prompt that ends where the assistant's answer begins.
        """
        if self.chat_template is None:
            return (
                f"<|im_start|>system\n{system or SMOLLM_SYSTEM_LINE}<|im_end|>\n"
                f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
            )
        instructions = [] if system is None else [{"role": "system", "content": system}]
        return _render(
            self.chat_template,
            messages=[*instructions, {"role": "user", "content": text}],
            bos_token=self.bos_token or "",
            eos_token=self.eos_token or "",
        )


def from_gguf(fields: Mapping[str, Any]) -> Tokenizer:
    """Builds the tokenizer that a GGUF file describes.

    Args:
      fields: Metadata of the file, as `key -> value`.

    Returns:
      The tokenizer.

    Raises:
      ValueError: If the file's tokenizer is not a byte-level BPE known here.
    """
    kind = fields.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise ValueError(
            f"The GGUF file holds a {kind!r} tokenizer; only byte-level BPE ('gpt2') is read. "
            "Pass a Hugging Face folder with tokenizer.json instead."
        )
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    pre = fields.get("tokenizer.ggml.pre", "gpt-2")
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: token_id for token_id, token in enumerate(tokens)},
            merges=merges,
            ignore_merges=pre == "llama-bpe",
        )
    )
    _set_byte_level(backend, pre)
    types = fields.get("tokenizer.ggml.token_type", [])
    backend.add_special_tokens(
        [
            tokenizers.AddedToken(token, special=True, normalized=False)
            for token, token_type in zip(tokens, types, strict=False)
            if token_type == SPECIAL_TOKEN_TYPE
        ]
    )

    bos = fields.get("tokenizer.ggml.bos_token_id")
    ends = [
        fields[key]
        for key in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
        if key in fields
    ]
    return Tokenizer(
        backend=backend,
        eos_token_ids=tuple(dict.fromkeys(ends)),
        bos_token=None if bos is None else tokens[bos],
        eos_token=tokens[ends[0]] if ends else None,
        adds_bos=bool(fields.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe")),
        chat_template=fields.get("tokenizer.chat_template"),
    )


def from_folder(folder: pathlib.Path) -> Tokenizer:
    """Reads the tokenizer of a Hugging Face model folder.

    Args:
      folder: Holds tokenizer.json and, usually, tokenizer_config.json and config.json.

    Returns:
      The tokenizer.

    Raises:
      FileNotFoundError: If tokenizer.json is missing.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{folder} has no tokenizer.json. Save the model's fast tokenizer into the folder."
        )
    backend = tokenizers.Tokenizer.from_file(str(path))
    settings = _read_json(folder / "tokenizer_config.json")
    bos, eos = (_token_text(settings.get(f"{name}_token")) for name in ("bos", "eos"))

    ends = _read_json(folder / "generation_config.json").get(
        "eos_token_id", _read_json(folder / "config.json").get("eos_token_id")
    )
    if ends is None and eos is not None:
        ends = backend.token_to_id(eos)
    ends = [ends] if isinstance(ends, int) else ends or []

    template = settings.get("chat_template")
    template_file = folder / "chat_template.jinja"
    if template is None and template_file.exists():
        template = template_file.read_text(encoding="utf-8")
    if isinstance(template, list):  # Several named templates: the default one.
        template = {item["name"]: item["template"] for item in template}.get("default")

    bos_id = None if bos is None else backend.token_to_id(bos)
    return Tokenizer(
        backend=backend,
        eos_token_ids=tuple(ends),
        bos_token=bos,
        eos_token=eos,
        adds_bos=bos_id is not None and backend.encode("a").ids[:1] == [bos_id],
        chat_template=template,
    )


def _set_byte_level(backend: tokenizers.Tokenizer, pre: str) -> None:
    """Sets how text is cut before merging, by the GGUF's name for it."""
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
            f"The GGUF file cuts text by the rule {pre!r}; known rules are 'smollm', 'gpt-2' and "
            "'llama-bpe'. Pass a Hugging Face folder with tokenizer.json instead."
        )
    backend.pre_tokenizer = cut
    backend.decoder = decoders.ByteLevel()


def _render(template: str, **values: Any) -> str:
    """Renders a chat template; templates are foreign code, so in a sandbox."""
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
    return environment.from_string(template).render(add_generation_prompt=True, **values)


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads a JSON object; an absent file reads as an empty one."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _token_text(token: str | dict[str, Any] | None) -> str | None:
    """Returns the text of a token, which is stored bare or inside an object."""
    return token["content"] if isinstance(token, dict) else token
