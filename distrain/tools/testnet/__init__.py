"""Several hosts on one Linux machine, with links of a chosen bandwidth, delay and loss."""
