"""The mma.sync family: sm_120a, sm_121a and sm_90a from one source."""
