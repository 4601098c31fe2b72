"""Looking at a run from outside, by its folder."""
