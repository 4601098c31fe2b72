"""Starts trainings: on hosts over ssh, as the jobs of a sweep, or as the tasks of a scheduler's job."""
