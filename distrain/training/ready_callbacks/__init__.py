"""Callbacks that come with distrain, one file each; ``callbacks=[NAME, …]`` chooses them."""
