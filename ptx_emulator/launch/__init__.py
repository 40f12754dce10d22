"""From a compiled CuTe DSL callable to a Launch: kernel, geometry and parameter bytes.

cute.compile --host code--> shim.cpp --callback--> host.py --Launch--> the machine
"""
