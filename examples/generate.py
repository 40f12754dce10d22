"""Generates text with SmolLM2-135M, its attention computed by flash-attn-4 from the Kernels Hub.

    make demo                                   # sets everything up and runs this
    python examples/generate.py --help          # once it is set up

The kernel is loaded by `kernels.get_kernel`, as everywhere; LOCAL_KERNELS makes that name stand for
this checkout's build/ directory. Then the same prompt runs with transformers' eager attention. The
last line says whether the two agree, and the exit status says it again.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPO_ID = "flash-attn-4-org/flash-attn-4"
BUILD = Path(__file__).resolve().parents[1] / "build"

# Read when the packages below are imported: take kernel and weights from this machine.
os.environ.setdefault("LOCAL_KERNELS", f"{REPO_ID}={BUILD}")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from kernels import get_kernel  # noqa: E402
from smollm2 import model_directory  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer  # noqa: E402

PROMPT = "Explain in a few sentences why the sky is blue."
# Two correct float32 programs that add in a different order stay far below this on these logits.
FLOAT32_TOLERANCE = 1e-3


class DemoFailure(Exception):
    """The two attention implementations disagree, or the kernel was not used."""


@dataclass
class Answer:
    """What one run of the model gave: its tokens, and the time from the first one to the last."""

    tokens: torch.Tensor
    seconds: float
    prompt_length: int

    @property
    def num_tokens(self) -> int:
        return self.tokens.shape[-1] - self.prompt_length

    @property
    def tokens_per_s(self) -> float:
        return (self.num_tokens - 1) / self.seconds if self.num_tokens > 1 else 0.0


class Clock(TextStreamer):
    """A streamer that also notes when each token came. Its first call brings the prompt."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        super().put(value)


def generate(model: Any, tokenizer: Any, prompt: torch.Tensor, max_new_tokens: int) -> Answer:
    """Greedy text for `prompt` (1, length), streamed to standard output."""
    clock = Clock(tokenizer)
    tokens = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
        streamer=clock,
    )
    return Answer(tokens, clock.times[-1] - clock.times[1], prompt.shape[-1])


@torch.inference_mode()
def logits(model: Any, implementation: str, tokens: torch.Tensor) -> torch.Tensor:
    """Logits at every position of `tokens`, in float32, with the named attention implementation."""
    model.set_attn_implementation(implementation, allow_all_kernels=True)
    return model(tokens).logits.float()


def compare(model: Any, ours: Answer, eager: Answer) -> float:
    """The largest difference of logits on our text; raises DemoFailure if it is too large.

    In float32 the two texts must be the same and the logits within `FLOAT32_TOLERANCE`. In half
    precision the kernel may be twice as far from float32 eager attention as half-precision eager
    attention is: the acceptance rule of FlashAttention.
    """
    with_kernel = logits(model, REPO_ID, ours.tokens)
    with_eager = logits(model, "eager", ours.tokens)
    difference = (with_kernel - with_eager).abs().max().item()
    if model.dtype == torch.float32:
        if not torch.equal(ours.tokens, eager.tokens):
            raise DemoFailure("the texts differ in float32")
        limit, error = FLOAT32_TOLERANCE, difference
    else:
        exact = logits(model.float(), "eager", ours.tokens)
        limit = 2 * (with_eager - exact).abs().max().item()
        error = (with_kernel - exact).abs().max().item()
    if not error <= limit:
        raise DemoFailure(f"logits are off by {error:.3g}, and {limit:.3g} is allowed")
    return difference


def run(arguments: argparse.Namespace) -> str:
    """The whole demo; returns what to say of it. Raises DemoFailure if the two runs disagree."""
    kernel = get_kernel(REPO_ID, version=1)
    print(kernel.describe())

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    directory = arguments.model or model_directory()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=dtype,
        device_map=device,
        attn_implementation=REPO_ID,
        allow_all_kernels=True,  # this kernel's publisher is not on the Hub's list of trusted ones
    )
    if model.config._attn_implementation != REPO_ID:
        raise DemoFailure(f"transformers chose {model.config._attn_implementation} instead")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": arguments.prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    ).input_ids.to(device)

    print(f"\n--- {REPO_ID} on {device}, {dtype}: {arguments.prompt}")
    ours = generate(model, tokenizer, prompt, arguments.max_new_tokens)
    print(f"\n--- eager attention on {device}, {dtype}: the same prompt")
    model.set_attn_implementation("eager")
    eager = generate(model, tokenizer, prompt, arguments.max_new_tokens)
    print(f"\neager attention: {eager.tokens_per_s:.1f} tokens/s")

    difference = compare(model, ours, eager)
    return (
        f"variant={device} tokens={ours.num_tokens} tokens_per_s={ours.tokens_per_s:.1f} "
        f"max_abs_logit_diff={difference:.3g}"
    )


def main() -> None:
    """Run the demo; end with one line and the exit status that tell its outcome."""
    parser = argparse.ArgumentParser(description="Generate text with flash-attn-4.")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--model", type=Path, help="a Llama-like model (default: SmolLM2-135M)")
    arguments = parser.parse_args()
    try:
        outcome = run(arguments)
    except Exception as error:  # whatever went wrong, the last line must say so
        if not isinstance(error, DemoFailure):
            sys.excepthook(type(error), error, error.__traceback__)
        sys.stderr.flush()
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"demo: FAILED {reason}", flush=True)
        sys.exit(1)
    print(f"demo: ok {outcome}")


if __name__ == "__main__":
    main()
