"""Hurts a training at random moments, lets it go on, and compares what comes out with the undisturbed run."""
