"""The machine: grid -> cluster -> CTA -> gangs of warps, memory, barriers, asynchronous work."""
