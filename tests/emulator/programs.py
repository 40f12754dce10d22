"""Small PTX programs, launched without a compiler."""

import torch

import ptx_emulator
from ptx_emulator.launch.host import Launch

HEADER = """.version 8.7
.target sm_120a
.address_size 64
.extern .shared .align 128 .b8 smem[];
.visible .entry program(
.param .u64 .ptr .align 16 program_param_0
)
DIRECTIVES{
.reg .pred %p<10>;
.reg .b32 %r<400>;
.reg .b64 %rd<60>;
"""
# %rd1: the tensor; %r1: shared memory; %r2: the thread; %r3: its warp
PROLOGUE = """ld.param.b64 %rd1, [program_param_0];
mov.b32 %r1, smem;
mov.u32 %r2, %tid.x;
shr.u32 %r3, %r2, 5;
"""


def run(body: str, warps: int = 1, smem: int = 4096, schedule: int = 0, **options):
    """Run `body` on one CTA of an sm_120a card with a tensor of 256 zeros; returns the tensor.

    Options: `arch`, `strict`, `data` (another tensor), grid, cluster, directives, and those of a
    session.
    """
    data = options.pop("data", None)
    if data is None:
        data = torch.zeros(256, dtype=torch.int32)
    arch, strict = options.pop("arch", "sm_120a"), options.pop("strict", True)
    launch = Launch(
        kernel="program",
        ptx=HEADER.replace("DIRECTIVES", options.pop("directives", ""))
        + PROLOGUE
        + body
        + "\nret;\n}\n",
        grid=options.pop("grid", (1, 1, 1)),
        block=(32 * warps, 1, 1),
        cluster=options.pop("cluster", (1, 1, 1)),
        dynamic_smem=smem,
        static_smem=0,
        stream=0,
        params=(data.data_ptr().to_bytes(8, "little"),),
        attributes=(),
    )
    with ptx_emulator.session(arch, schedule=schedule, strict=strict, **options) as emulator:
        emulator.allocations.add_tensor(data)
        emulator.launch(launch)
    return data
