"""Exact attention for NVIDIA Blackwell, written in CuTe DSL.

The kernels and the host code that chooses, compiles and launches them:

    AttentionProblem --plan--> Plan --compiler--> compiled callable --launch--> out, lse

Importing this package needs neither a GPU nor nvidia-cutlass-dsl; both are asked for by the first
call that launches a kernel.
"""
