"""SmolLM2-135M in vLLM with flash-attn-4 as its attention backend.

    pip install "./integrations/vllm[cuda]"      # in vLLM's environment, or `make test-vllm`
    python examples/vllm_generate.py

The same for a server: vllm serve MODEL --attention-backend CUSTOM. On a machine without a GPU vLLM
has one backend only, whose place the plugin then takes.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

REPO_ID = "flash-attn-4-org/flash-attn-4"
BUILD = Path(__file__).resolve().parents[1] / "build"
PROMPTS = ["The capital of France is", "Water boils at", "Once upon a time"]


def main() -> None:
    """Complete the prompts and print the text."""
    parser = argparse.ArgumentParser(description="Generate text in vLLM with flash-attn-4.")
    parser.add_argument("--model", type=Path, help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    arguments = parser.parse_args()

    import torch

    os.environ.setdefault("LOCAL_KERNELS", f"{REPO_ID}={BUILD}")
    if not torch.cuda.is_available():
        os.environ.setdefault("FLASH_ATTN_4_REPLACES", "CPU_ATTN")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GB

    from smollm2 import model_directory
    from vllm import LLM, SamplingParams

    directory = arguments.model or model_directory()
    llm = LLM(
        str(directory),
        attention_backend="CUSTOM",
        max_model_len=512,
        enforce_eager=not torch.cuda.is_available(),  # compiling does not pay on a CPU
    )
    greedy = SamplingParams(temperature=0, max_tokens=arguments.max_new_tokens)
    for prompt, result in zip(PROMPTS, llm.generate(PROMPTS, greedy), strict=True):
        print(f"{prompt}{result.outputs[0].text}\n")
    print("vllm: ok")


if __name__ == "__main__":
    main()
