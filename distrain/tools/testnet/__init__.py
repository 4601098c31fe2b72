"""Virtual hosts on one Linux machine, joined by links of a chosen bandwidth, delay and packet loss."""
