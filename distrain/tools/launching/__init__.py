"""Starting trainings: on hosts over ssh, one after the other as a sweep, as tasks of a scheduler's job."""
