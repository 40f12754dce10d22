"""Launches compiled kernels without their compiler: from a cubin and a description of its launches.

    CuTe DSL --host_code--> Program + cubin --(package, disk cache)--> Kernel --driver--> the card

What CuTe DSL compiles for the host (sizes, strides and TMA descriptors into a kernel's parameters)
is machine code of the building host. `host_code` translates it, before it becomes that, into a
`Program`: data that any host evaluates.
"""
