"""Comparing runs: reading their folders, finding what differs, and a page that shows them side by side."""
