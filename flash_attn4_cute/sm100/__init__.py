"""The tcgen05 family: sm_100a and sm_103a from one source."""
