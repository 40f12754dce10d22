"""Checks that watch a run and change nothing in it."""
