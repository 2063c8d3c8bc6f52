"""What a Hugging Face model directory tells before anything loads it: JSON files and weight headers.

Nothing here imports torch or unpickles; a directory is judged in milliseconds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r2m_ray.problems import Problem

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
DEFAULT_LABELS = 2
"""transformers leaves `id2label` out of config.json where a model has its default of two labels."""


def local_directory(name: str) -> Path | None:
    """The directory that a model name means; None where it can only be an id of the model hub.

    ``org/model`` is taken for a directory that is missing if a directory ``org`` lies here.
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
        """Longest input in tokens; None for a model that states none."""
        return self._number("max_position_embeddings") or self._number("n_positions")

    @property
    def vocabulary(self) -> int | None:
        """Rows of the embedding; None for a model that does not state them."""
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

    def problems(self) -> Iterator[Problem]:
        """What is wrong with weights and tokenizer, whatever the model's role."""
        yield from self._weight_problems()
        yield from self._tokenizer_problems()
        if "auto_map" in self.config and not self.architecture:
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
        for name in sorted(files):
            fault = _damage(self.directory / name)
            if fault:
                yield self.problem(name, f"{fault}; copy the file again")

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
        elif self.vocabulary is not None and ids > self.vocabulary:
            yield self.problem(
                "tokenizer.json",
                f"has ids up to {ids - 1}, but vocab_size is {self.vocabulary} in config.json; use its own "
                "tokenizer, or resize the embedding",
            )


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


def read_json(file: Path) -> object:
    """The content of a JSON file; None where it cannot be read."""
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def _damage(file: Path) -> str | None:
    """What is wrong with a safetensors file by its header and size; None if nothing."""
    if not file.is_file():
        return "missing"
    size = file.stat().st_size
    with file.open("rb") as stream:
        header_size = int.from_bytes(stream.read(8), "little")
        if size < 8 or header_size > size - 8:
            return f"cut off: {size} bytes end inside its header"
        try:
            header = json.loads(stream.read(header_size))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, AttributeError, KeyError, TypeError, IndexError):
            return "its header is not that of a safetensors file"
    expected = 8 + header_size + max(ends, default=0)
    return None if size == expected else f"{size} bytes where its header says {expected}"


def _token_ids(file: Path) -> int | None:
    """One more than the largest id of a tokenizer.json; None where it is not one."""
    content = read_json(file)
    if not isinstance(content, Mapping) or not isinstance(content.get("model"), Mapping):
        return None
    entries = content["model"].get("vocab", ())
    ids = [len(entries) - 1] if isinstance(entries, list) else list(dict(entries).values())
    ids += [token["id"] for token in content.get("added_tokens", ())]
    return max(ids, default=-1) + 1
