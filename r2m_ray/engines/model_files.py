"""What a Hugging Face model directory says before anything loads it: JSON files and headers of weight files.

Nothing here unpickles, and no code of a model is run. Reading JSON and headers takes milliseconds and imports
no torch. The weights of a small model are also searched for NaN, at the speed of the disk.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from r2m_ray.errors import Problem, shown

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
LARGEST_JSON = 256 * 2**20
"""Bytes; a tokenizer of a quarter of a million words has 40 MiB."""
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
DEFAULT_LABELS = 2
"""transformers leaves `id2label` out of config.json where a model has its default of two labels."""
SCANNED_BYTES = 2 * 2**30
"""Larger models are not searched for NaN: that would delay every start, and the first step finds it too."""
CHUNK_NUMBERS = 4 * 2**20
FLOATS = ("F64", "F32", "F16", "BF16")
"""Types that the search for NaN reads, by the format's names."""


def local_directory(name: str) -> Path | None:
    """The directory that a model name means; None where it can only be an id of the model hub.

    ``org/model`` means a missing directory if a directory ``org`` exists here.
    """
    path = Path(name)
    is_id = HUB_ID.fullmatch(name) and not ("/" in name and path.parent.is_dir())
    return None if is_id and not path.exists() else path


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model directory whose config.json could be read; ``field`` names it in the configuration."""

    field: str
    directory: Path
    config: Mapping[str, Any]

    @property
    def labels(self) -> int:
        """Outputs of a sequence classifier."""
        labels = self.config.get("id2label")
        return len(labels) if isinstance(labels, Mapping) else self._number("num_labels") or DEFAULT_LABELS

    @property
    def positions(self) -> int | None:
        """Longest input in tokens; None where config.json does not state it."""
        return self._number("max_position_embeddings") or self._number("n_positions")

    @property
    def vocabulary(self) -> int | None:
        """Rows of the embedding; None where config.json does not state them."""
        return self._number("vocab_size")

    @property
    def architecture(self) -> str:
        """Class that wrote the model, such as ``LlamaForCausalLM``; empty where it is not stated."""
        names = self.config.get("architectures")
        return str(names[0]) if isinstance(names, list) and names else ""

    @property
    def parameters(self) -> int:
        """Number of weights, by the size of their files and the type config.json states."""
        dtype = self.config.get("dtype", self.config.get("torch_dtype"))
        size = sum(file.stat().st_size for file in self.directory.glob("*.safetensors"))
        return size // (2 if dtype in ("bfloat16", "float16") else 4)

    @property
    def has_chat_template(self) -> bool:
        """Whether its tokenizer renders prompt and response as turns of a chat."""
        settings = read_json(self.directory / "tokenizer_config.json")
        stated = isinstance(settings, Mapping) and bool(settings.get("chat_template"))
        return stated or any((self.directory / name).is_file() for name in TEMPLATE_FILES)

    def problems(self) -> Iterator[Problem]:
        """What is wrong with weights and tokenizer, whatever the model's role."""
        yield from self._weight_problems()
        yield from self._tokenizer_problems()
        if "auto_map" not in self.config:
            return
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

        if not self.architecture or self.config.get("model_type") not in CONFIG_MAPPING_NAMES:
            message = "needs code of its own (auto_map), which is never run; use a model transformers knows"
            yield self.problem("config.json", message)

    def problem(self, file: str, message: str, *, warning: bool = False) -> Problem:
        """A problem with one of the directory's files."""
        return Problem(self.field, f"{self.directory / file}: {message}", warning)

    def _number(self, name: str) -> int | None:
        """A size in config.json, or in the text part of a multi-modal one."""
        text = self.config.get("text_config")
        for part in (self.config, text if isinstance(text, Mapping) else {}):
            if isinstance(part.get(name), int):
                return int(part[name])
        return None

    def _weight_problems(self) -> Iterator[Problem]:
        index = self.directory / WEIGHTS_INDEX
        files = {WEIGHTS}
        if index.is_file():
            content = read_json(index)
            shards = content.get("weight_map") if isinstance(content, Mapping) else None
            if not isinstance(shards, Mapping):
                yield self.problem(WEIGHTS_INDEX, "has no weight_map; copy the file again")
                return
            files = {str(shard) for shard in shards.values()}
        elif not (self.directory / WEIGHTS).is_file():
            yield self._no_weights()
            return
        faults = {
            name: damage(self.directory / name)
            if Path(name).name == name
            else "lies outside the model directory"
            for name in sorted(files)
        }
        for name, fault in faults.items():
            if fault:
                yield self.problem(name, f"{fault}; copy the file again")
        if any(faults.values()):
            return
        paths = [self.directory / name for name in faults]
        if sum(file.stat().st_size for file in paths) > SCANNED_BYTES:
            return
        for file in paths:
            if tensor := nonfinite_tensor(file):
                message = f"{tensor} holds NaN or infinity; use weights from before it diverged"
                yield self.problem(file.name, message)

    def _no_weights(self) -> Problem:
        pickles = sorted(file.name for pattern in PICKLES for file in self.directory.glob(pattern))
        if pickles:
            return self.problem(
                pickles[0],
                "only pickled weights, which are never loaded, because a pickle can run code; where you "
                "trust it, load the model with transformers and save it by save_pretrained, as safetensors",
            )
        return self.problem(WEIGHTS, "no weights here; save the model with save_pretrained")

    def _tokenizer_problems(self) -> Iterator[Problem]:
        if not any((self.directory / name).is_file() for name in TOKENIZER_FILES):
            message = "no tokenizer here; save it beside the model with tokenizer.save_pretrained"
            yield self.problem("tokenizer.json", message)
            return
        file = self.directory / "tokenizer.json"
        ids = _token_ids(file) if file.is_file() else 0
        if ids is None:
            yield self.problem(
                "tokenizer.json", "not a tokenizer; save it again with tokenizer.save_pretrained"
            )
            return
        # The stored embedding counts, whatever config.json says.
        for rows, stated in self._embeddings():
            if rows < ids:
                message = f"has ids up to {ids - 1}, but {stated}; use the model's own tokenizer"
                yield self.problem("tokenizer.json", message)
                return

    def _embeddings(self) -> Iterator[tuple[int, str]]:
        """How many rows the embedding has, and where that is stated."""
        if self.vocabulary is not None:
            yield self.vocabulary, f"vocab_size is {self.vocabulary} in config.json"
        for file in sorted(self.directory.glob("*.safetensors")):
            for name, shape in {} if damage(file) else stored_shapes(file).items():
                if name.endswith(EMBEDDINGS) and shape:
                    yield shape[0], f"{name} in {file.name} has {shape[0]} rows"


def open_model(field: str, directory: Path) -> ModelFiles | Problem:
    """The directory's files, or the reason why it is not a model directory."""
    if not directory.exists():
        return Problem(
            field, f"{directory}: no such directory; give a model directory or a hub id (org/name)"
        )
    if not directory.is_dir():
        return Problem(field, f"{directory}: not a directory; give the directory that holds its config.json")
    file = directory / "config.json"
    if not file.is_file():
        return Problem(field, f"{file}: missing, so this is no model; save one with save_pretrained")
    content = read_json(file)
    if not isinstance(content, Mapping):
        return Problem(field, f"{file}: not a JSON object; save the model again with save_pretrained")
    return ModelFiles(field, directory, content)


def chat_problems(policy: ModelFiles, reward: ModelFiles) -> Iterator[Problem]:
    """A warning where one model reads turns of a chat and the other plain text; both are legal."""
    if policy.has_chat_template is not reward.has_chat_template:
        bare, chat = (policy, reward) if reward.has_chat_template else (reward, policy)
        yield bare.problem(
            "tokenizer_config.json",
            f"has no chat_template, so it reads prompt and response as one text, while {chat.field} reads "
            "turns of a chat; if that is not meant, save the tokenizer with its chat_template",
            warning=True,
        )


def read_json(file: Path) -> object:
    """The content of a JSON file; None where it cannot be read."""
    try:
        if file.stat().st_size > LARGEST_JSON:
            return None
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def damage(file: Path) -> str | None:
    """What is wrong with a safetensors file by its header and size; None if nothing.

    The library checks that the header is small, is valid, and covers every byte of the file exactly once.
    """
    if not file.is_file():
        return "missing"
    try:
        with safe_open(file, framework="np"):
            return None
    except (SafetensorError, OSError) as error:
        return f"not a complete safetensors file ({shown(error)})"


def stored_shapes(file: Path) -> dict[str, list[int]]:
    """Name and shape of every tensor of an undamaged safetensors file, from its header."""
    with safe_open(file, framework="np") as tensors:
        return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118


def nonfinite_tensor(file: Path) -> str | None:
    """Name of the first tensor of an undamaged file that holds NaN or infinity; None if none does."""
    status = file.stat()
    return _scanned(file, status.st_size, status.st_mtime_ns)


@cache
def _scanned(file: Path, size: int, changed: int) -> str | None:
    """`nonfinite_tensor` of a file in this state: runs of a sweep share their models.

    Rows are read in chunks, so memory does not grow with the file.
    """
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            stored = tensors.get_slice(name)
            if stored.get_dtype() not in FLOATS:
                continue
            shape = stored.get_shape()
            rows = max(1, CHUNK_NUMBERS // max(1, math.prod(shape[1:])))
            parts = [slice(i, i + rows) for i in range(0, shape[0], rows)] if shape else [...]
            if not all(bool(stored[part].isfinite().all()) for part in parts):
                return str(name)
    return None


def _token_ids(file: Path) -> int | None:
    """One more than the largest id of a tokenizer.json; None where it is not one."""
    content = read_json(file)
    if not isinstance(content, Mapping) or not isinstance(content.get("model"), Mapping):
        return None
    try:
        entries = content["model"].get("vocab", ())
        ids = [len(entries) - 1] if isinstance(entries, list) else list(dict(entries).values())
        ids += [token["id"] for token in content.get("added_tokens", ())]
        return int(max(ids, default=-1)) + 1
    except (TypeError, ValueError, KeyError):
        return None
