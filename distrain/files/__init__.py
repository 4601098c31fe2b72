"""Files: written so that a crash leaves the old or the new content, and read without trusting who wrote them."""
