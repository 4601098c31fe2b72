"""The health of a run: heartbeats, which rank failed first and where, and the reports about it."""
