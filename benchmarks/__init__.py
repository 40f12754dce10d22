"""Speed, measured beside the kernels that a user would otherwise take, in one run on one card."""
